"""Batches: of the images of a split, in a reproducible order, and of windows of a text."""
