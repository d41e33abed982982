"""Checks of what a run needs, before it starts: this machine, its storage, and the ranks together."""
