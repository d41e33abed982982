"""Injected faults: deterministic, once per run."""
