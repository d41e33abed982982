"""torch and timm alone: the model, its optimiser and what is averaged or frozen of it."""
