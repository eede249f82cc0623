"""Tasks, the training loop, its records and checkpoints."""
