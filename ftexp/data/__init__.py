"""Data: sources of samples, their order, feeds that bring them to workers, and augmentation."""
