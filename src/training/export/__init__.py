"""Writes a model in the form that other software loads, and checks it there."""
