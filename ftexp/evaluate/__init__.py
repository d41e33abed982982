"""Evaluation of a checkpoint on the data of its run or on other data."""
