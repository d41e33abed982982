"""Evaluation of a split: losses, metrics and findings, each sample counted once."""
