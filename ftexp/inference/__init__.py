"""Predictions for more images than fit into memory: what is read, how it is cut into parts, and who computes them."""
