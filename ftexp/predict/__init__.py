"""Predictions for any number of images."""
