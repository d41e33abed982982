"""Report of a run: one self-contained HTML file, and its charts as PNG."""
