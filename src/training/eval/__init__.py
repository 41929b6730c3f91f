"""Evaluation: benchmark -> encode -> rank -> report."""
