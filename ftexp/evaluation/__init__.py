"""Counting each sample of a split once."""
