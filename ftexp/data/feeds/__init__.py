"""Feeds, which bring rows to a worker: cached or streamed."""
