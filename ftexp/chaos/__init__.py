"""Faults made on purpose: deterministic, once per run."""
