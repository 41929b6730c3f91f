"""Training data: from shards or tables to batches, in an order that depends only on seed and epoch."""
