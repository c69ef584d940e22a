"""Policies, and the modules that have them."""
