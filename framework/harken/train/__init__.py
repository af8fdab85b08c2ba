"""The one loop, its state, checkpoints, metrics and logs."""
