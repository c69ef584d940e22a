"""Files of byte-level BPE tokenizers, `tokenizer.json`, in the format of the `tokenizers` library.

A file may come from a stranger. It is therefore read as data, checked, and written again from the parts that are
known; the library only ever sees the result.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from revnet._documents import parse_json
from revnet._outside_text import encodable

MOST_BYTES = 2**25
"""Largest file of a tokenizer."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
_PATTERNS = (_GPT2, _GPT4, _GPT4.replace("{1,3}", ""))
"""Patterns that cut a text into words, of GPT-2, GPT-4 and Qwen. Another one could take hours on a short text."""
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names of the token between documents, the most usual first."""


def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a token stands for, as in GPT-2: bytes without a picture have other ones."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


BYTE_OF_LETTER = _byte_of_letter()


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A byte-level BPE tokenizer, which writes every text in tokens and returns it unchanged."""

    tokens: tuple[str, ...]
    """Tokens in the order of their numbers."""
    merges: tuple[tuple[str, str], ...]
    """Pairs of tokens to join, the first ones first."""
    added: Mapping[str, bool]
    """Tokens that are not made of bytes, and whether they are special: a special one is never read from a text."""
    pattern: str | None = None
    """Pattern that cuts a text into words; None for the one of GPT-2, built into the library."""
    ignores_merges: bool = False
    """Whether a word that is a token stays whole."""

    @cached_property
    def token_numbers(self) -> dict[str, int]:
        """Number of each token."""
        return {token: number for number, token in enumerate(self.tokens)}

    @property
    def end_of_text(self) -> int | None:
        """Number of the special token between documents; None if there is none of the usual ones."""
        name = next((name for name in _END_OF_TEXT if self.added.get(name)), None)
        return None if name is None else self.token_numbers[name]

    def bytes_of(self, number: int) -> bytes:
        """Return the bytes of a token; a token that is not made of bytes has the ones of its name."""
        token = self.tokens[number]
        return token.encode() if token in self.added else bytes(map(BYTE_OF_LETTER.__getitem__, token))

    def to_json(self) -> str:
        """Return the content of the file, the same for equal tokenizers."""
        added = [
            {
                "id": self.token_numbers[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": is_special,
            }
            for token, is_special in sorted(self.added.items(), key=lambda item: self.token_numbers[item[0]])
        ]
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        words: dict[str, Any] = bytes_only
        if self.pattern is not None:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            words = {"type": "Sequence", "pretokenizers": [split, bytes_only | {"use_regex": False}]}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": self.ignores_merges,
            "vocab": self.token_numbers,
            "merges": [" ".join(pair) for pair in self.merges],
        }
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": words,
            "post_processor": None,
            "decoder": bytes_only,
            "model": model,
        }
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def parse_tokenizer(text: str) -> TokenizerFile:
    """Read the content of a `tokenizer.json`.

    Raises:
        ValueError: The content is damaged, or is not of a byte-level BPE tokenizer; the message is the reason.
    """
    content = parse_json(text)
    model = _mapping(content.get("model"), "`model`")
    if model.get("type", "BPE") != "BPE":
        raise ValueError("its `model` is not BPE")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"its `model` has `{name}`, which byte-level BPE does not")
    if content.get("normalizer") is not None:
        raise ValueError("its `normalizer` changes texts, so that tokens do not return them; remove it")
    added = _read_added(content.get("added_tokens") or [])
    numbers = {**_mapping(model.get("vocab"), "`vocab`")}
    for token, (number, _) in added.items():
        if numbers.setdefault(token, number) != number:
            raise ValueError(f"its token {token!r} has two numbers")
    if any(type(number) is not int for number in numbers.values()) or set(numbers.values()) != {*range(len(numbers))}:
        raise ValueError("its tokens are not numbered from 0 on without gaps")
    for token in numbers:
        if token not in added and not (token and BYTE_OF_LETTER.keys() >= set(token)):
            raise ValueError(f"its token {token[:50]!r} is not made of the letters for bytes")
    if not numbers.keys() >= BYTE_OF_LETTER.keys():
        raise ValueError("it lacks tokens of single bytes, so that it cannot write every text")
    return TokenizerFile(
        tokens=tuple(sorted(numbers, key=numbers.__getitem__)),
        merges=_read_merges(model.get("merges"), numbers),
        added={token: is_special for token, (_, is_special) in added.items()},
        pattern=_read_pattern(content.get("pre_tokenizer")),
        ignores_merges=model.get("ignore_merges") is True,
    )


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it lacks {name}")
    return value


def _read_added(entries: Any) -> dict[str, tuple[int, bool]]:
    """Return the number of each token that is not made of bytes, and whether it is special."""
    if not isinstance(entries, list):
        raise ValueError("its `added_tokens` are not a list")
    added: dict[str, tuple[int, bool]] = {}
    for entry in entries:
        token, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or not token or type(number) is not int or token in added:
            raise ValueError("its `added_tokens` are damaged")
        if encodable(token) != token:
            raise ValueError(f"its token {token[:50]!r} is not text that UTF-8 can write")
        if any(entry.get(name) for name in ("single_word", "lstrip", "rstrip")):
            raise ValueError(f"its token {token[:50]!r} takes spaces away, so that tokens do not return every text")
        added[token] = number, entry.get("special") is True
    return added


def _read_merges(merges: Any, numbers: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    if not isinstance(merges, list):
        raise ValueError("it lacks `merges`")
    pairs = []
    for merge in merges:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
        is_pair = len(pair) == 2 and all(isinstance(token, str) for token in pair)
        if not is_pair or any(token not in numbers for token in (*pair, "".join(pair))):
            raise ValueError(f"its merge {str(merge)[:50]!r} does not join two of its tokens to a third")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _read_pattern(words: Any) -> str | None:
    """Return the pattern of the part that cuts a text into words; None for the built-in one."""
    steps = words.get("pretokenizers") if isinstance(words, dict) and words.get("type") == "Sequence" else [words]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError("its `pre_tokenizer` is not known")
    kinds = [step.get("type") for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError("its `pre_tokenizer` is not `ByteLevel`, or `Split` and `ByteLevel`")
    if steps[-1].get("add_prefix_space", True):
        raise ValueError("its `pre_tokenizer` adds a space to texts; set `add_prefix_space` to false")
    if steps[-1].get("use_regex", True) != (len(steps) == 1):
        raise ValueError("its `pre_tokenizer` must cut texts into words by exactly one pattern")
    if len(steps) == 1:
        return None
    pattern = steps[0].get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    if expression not in _PATTERNS or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        raise ValueError("its `Split` is not by the pattern of GPT-2, GPT-4 or Qwen")
    return str(expression)
