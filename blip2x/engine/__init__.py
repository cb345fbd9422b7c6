"""The run folder, the training loop, checkpoints and progress."""
