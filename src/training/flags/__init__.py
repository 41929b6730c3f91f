"""Command-line flags, checked before any work. Nothing here imports torch, so --help answers at once."""
