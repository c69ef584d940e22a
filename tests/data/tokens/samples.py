"""A small tokenizer, written by hand."""

import json
from typing import Any

from revnet.data.tokens.tokenizer_file import BYTE_OF_LETTER, TokenizerFile

MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "¤"))


def small_tokenizer(**changes: Any) -> TokenizerFile:
    """Return a tokenizer of the bytes, four merges, and the end of a text."""
    tokens = ("<|endoftext|>", *sorted(BYTE_OF_LETTER), *map("".join, MERGES))
    return TokenizerFile(**{"tokens": tokens, "merges": MERGES, "added": {"<|endoftext|>": True}} | changes)


def small_content() -> dict[str, Any]:
    """Return the content of the file of that tokenizer."""
    content: dict[str, Any] = json.loads(small_tokenizer().to_json())
    return content
