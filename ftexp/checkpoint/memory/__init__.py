"""Snapshots of a checkpoint's content in memory that outlives the workers."""
