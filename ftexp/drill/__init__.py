"""Breaking a run on purpose and comparing what came of it."""
