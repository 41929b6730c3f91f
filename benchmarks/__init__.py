"""How much faster than the published scheme: ``python -m benchmarks``. See README.md here."""
