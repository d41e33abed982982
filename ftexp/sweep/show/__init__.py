"""Display of a sweep."""
