"""`prepare inspect`: what a shard set holds, as numbers and as pages."""
