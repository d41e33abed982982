"""Checkpoints: registry and states (content), store (writing and verification), manager (when), reading."""
