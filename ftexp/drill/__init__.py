"""Drill: inject faults into a run, and compare its result with a clean run's."""
