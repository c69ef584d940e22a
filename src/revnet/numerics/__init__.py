"""Numerics that can be trusted: how far rebuilt activations are from the true ones, and what to do about it."""
