"""Failures: their causes, what follows from them, and what is reported of them."""
