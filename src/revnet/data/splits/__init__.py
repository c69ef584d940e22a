"""Splits: labeled images in memory, in files or as a stream, and the data set that holds two of them."""
