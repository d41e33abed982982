"""Checkpoints: registry and states (what is saved), store (how bytes become trustworthy), manager (when), reading."""
