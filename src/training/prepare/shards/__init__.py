"""`prepare join`, and reading and writing shards for all commands."""
