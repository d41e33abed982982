"""Ray and its processes: starting, joining and stopping them."""
