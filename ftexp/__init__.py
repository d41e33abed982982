"""Fault-tolerant training of image models on Ray."""

__version__ = "0.1.0"
