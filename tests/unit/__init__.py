"""Tests in one process: no Ray instance, and no command started."""
