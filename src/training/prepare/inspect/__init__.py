"""`prepare inspect`: the content of a shard set, as numbers and as a page of samples."""
