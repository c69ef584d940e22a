"""Invertible layers, and the network that they build."""
