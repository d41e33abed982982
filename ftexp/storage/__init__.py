"""Durable bytes, on a disk or at a URI."""
