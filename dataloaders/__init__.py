"""Readers of the evaluation data: they turn folders on disk into image paths, captions and the pairs of both."""
