"""Exports a model to other software's format, and checks the features that the other software computes."""
