"""Tokens of texts: characters, or pairs of bytes that a tokenizer has learned to join."""
