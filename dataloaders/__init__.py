"""Readers of the evaluation data: from folders on disk to image paths, captions and who belongs to whom."""
