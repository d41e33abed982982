"""The model and its parts in torch and timm: losses, optimiser, schedule, EMA, freezing, sharding and distillation."""
