"""Decoding of image files: which part of an image is kept, and how it becomes pixels of the requested size."""
