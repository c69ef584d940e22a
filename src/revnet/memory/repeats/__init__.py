"""Predict deep models from a few of their equal blocks."""
