"""Hydra's launcher and sweeper."""
