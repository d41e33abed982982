"""Sharded models: their blocks, how they are built, and how they are distributed over the ranks."""
