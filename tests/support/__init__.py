"""Helpers shared by tests; no test imports from another test file."""
