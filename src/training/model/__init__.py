"""Models: configs, towers, tokenizers and weights."""
