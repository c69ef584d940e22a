"""Training a language model on a text."""
