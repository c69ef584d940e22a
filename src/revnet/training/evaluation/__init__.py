"""Evaluating a trained classifier: its errors on a test set, and its predictions for image files."""
