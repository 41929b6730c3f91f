"""Training data: from shards or tables to batches, in an order that is a pure function of seed, epoch and place."""
