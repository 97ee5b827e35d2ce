"""What survives a crash: checkpoints, the best weights, when to save."""
