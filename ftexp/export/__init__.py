"""Export of a trained model to formats that don't need ftexp."""
