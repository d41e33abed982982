"""What processes send to each other."""
