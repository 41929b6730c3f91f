"""Evaluation: encodes benchmarks, ranks them, and reports the results."""
