"""Durable storage, on a disk or at a URI."""
