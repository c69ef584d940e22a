"""Trained networks in folders, in runs of `revnet train`, and on the Hugging Face hub."""
