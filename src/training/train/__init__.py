"""Training: batch -> forward -> loss -> update, with checkpoints, resuming and validation."""
