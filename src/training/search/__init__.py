"""Searches a folder of images with a text or an image as query."""
