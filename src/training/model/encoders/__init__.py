"""Families of Hugging Face encoders that can be text towers with corner tokens; each file is one. See `family`."""
