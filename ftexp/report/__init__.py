"""Reports of runs and sweeps: one self-contained HTML file each, and its charts as PNG."""
