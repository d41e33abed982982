"""Many trials of one command: side by side, resumable, compared."""
