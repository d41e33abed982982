"""Classes for any number of images."""
