"""Messages between a run's processes."""
