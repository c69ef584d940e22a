"""Reversible blocks, and the sequence that runs them."""
