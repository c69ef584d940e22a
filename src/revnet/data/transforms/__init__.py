"""Transforms of a batch, on any device: preprocessing, augmentation and dequantization."""
