"""Image and text towers, corner tokens, and the forward pass of training."""
