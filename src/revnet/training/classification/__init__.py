"""Training a classifier of images."""
