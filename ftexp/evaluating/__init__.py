"""How good a saved checkpoint is, on the data of its run or on others."""
