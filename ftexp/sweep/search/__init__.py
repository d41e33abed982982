"""Search of hyperparameters: proposals and early stopping."""
