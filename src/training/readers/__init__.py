"""Readers of files that training, evaluation and preparation share: tables, tar shards, images, sentences."""
