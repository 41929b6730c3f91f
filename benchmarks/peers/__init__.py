"""Our commands beside those of the tools that people use today, as whole processes: `python -m benchmarks.peers`."""
