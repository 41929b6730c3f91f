"""Measures speed and memory against the published scheme: ``python -m benchmarks``. See README.md in this folder."""
