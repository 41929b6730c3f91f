"""Arranges the captions of a batch, and attention within arranged captions."""
