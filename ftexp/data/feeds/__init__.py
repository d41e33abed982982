"""How rows reach a worker: cached or streamed."""
