"""Augmentation of images, seeded by their position."""
