"""Augmentation of images, seeded by their positions."""
