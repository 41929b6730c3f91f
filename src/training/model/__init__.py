"""Models by name: config, towers, tokenizers, weights."""
