"""Workers that begin with everything imported: forked from a process that has imported it once."""
