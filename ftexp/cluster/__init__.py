"""Ray and its processes: where it is started, joined and ended."""
