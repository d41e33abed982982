"""Every file of a run or sweep directory: its one writer and its readers."""
