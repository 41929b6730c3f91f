"""Families of Hugging Face encoders that can be text towers with corner tokens, one per file. See `hf_tower`."""
