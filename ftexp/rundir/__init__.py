"""The files of a run or sweep directory: for each, its only writer and its readers."""
