"""From caption tables and images to training shards: `python -m training.prepare --help`."""
