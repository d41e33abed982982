"""A model that no process holds whole: its blocks, how it is built, and how it lies on the ranks."""
