"""`prepare join`, and functions to read and write shards for all commands."""
