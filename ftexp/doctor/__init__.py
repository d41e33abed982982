"""Checks of everything that a run needs, before it starts: this machine, the storage, and the ranks together."""
