"""Other programs that keep a run's numbers: TensorBoard, MLflow, Weights & Biases, and trackers of the user's."""
