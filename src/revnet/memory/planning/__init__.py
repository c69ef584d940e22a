"""Policies for the units of a model, chosen to fit a memory budget."""
