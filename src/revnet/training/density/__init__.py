"""Fitting a density to images, and sampling from it."""
