"""Tokenizers with corner tokens, transformers' tokenizers, and counts of lost tokens."""
