"""Failures: what caused one, and what is told of it."""
