"""Sweeps: many trials of one command, in parallel, resumable, compared."""
