"""Trackers: programs that keep or show a run's metrics, such as TensorBoard, MLflow, W&B and the user's own."""
