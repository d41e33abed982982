"""A sweep's processes."""
