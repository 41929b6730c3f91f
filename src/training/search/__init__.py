"""Searches a folder of images by text or by image."""
