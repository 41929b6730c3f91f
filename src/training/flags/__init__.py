"""Command-line flags, checked before any work. Nothing here imports torch, so that --help is fast."""
