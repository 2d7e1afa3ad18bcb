"""What runs a training: the trainer and the checks before it."""
