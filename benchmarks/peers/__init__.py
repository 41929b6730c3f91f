"""Compares our commands with those of other tools, as whole processes: `python -m benchmarks.peers`."""
