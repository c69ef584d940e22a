"""Files of tokenizers are read as data; the library is not needed."""

import json
import sys

import pytest
import torch

from revnet.data import BytePairVocabulary
from revnet.data.tokens.tokenizer_file import _GPT2, _GPT4, parse_tokenizer
from revnet.errors import DataError, MissingDependencyError
from tests.data.tokens.samples import MERGES, small_content, small_tokenizer

SPLIT = {"type": "Split", "pattern": {"Regex": _GPT4}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize("changes", [{}, {"pattern": _GPT4}, {"pattern": _GPT2, "ignores_merges": True}])
def test_writing_and_reading_are_inverse(changes):
    file = small_tokenizer(**changes)
    assert parse_tokenizer(file.to_json()) == file
    assert parse_tokenizer(file.to_json()).to_json() == file.to_json()


def test_reads_what_the_library_writes_in_other_releases():
    content = small_content()
    content["model"]["merges"] = [list(pair) for pair in MERGES]
    del content["model"]["vocab"]["<|endoftext|>"]  # listed among the added tokens only
    content["post_processor"] = {"type": "ByteLevel"}
    assert parse_tokenizer(json.dumps(content)) == small_tokenizer()


def test_tokens_return_their_bytes():
    vocabulary = BytePairVocabulary(small_tokenizer())
    the, umlaut = len(vocabulary) - 2, len(vocabulary) - 1
    assert vocabulary.decode(torch.tensor([the, umlaut, 0])) == " theä<|endoftext|>"
    sizes = vocabulary.token_bytes()
    assert sizes[[the, umlaut, 0]].tolist() == [4, 2, 0]
    assert sizes[1:257].tolist() == [1] * 256
    all_bytes = {vocabulary.file.bytes_of(token) for token in range(1, 257)}
    assert all_bytes == {bytes([byte]) for byte in range(256)}
    assert vocabulary.decode(torch.tensor([vocabulary.file.token_numbers["Ã"]])) == "\N{REPLACEMENT CHARACTER}"


def test_the_end_of_a_text_is_the_most_usual_special_token():
    assert BytePairVocabulary(small_tokenizer()).end_of_text == 0
    assert BytePairVocabulary(small_tokenizer(added={"<|endoftext|>": False})).end_of_text is None
    tokens = (*small_tokenizer().tokens, "</s>")
    both = small_tokenizer(tokens=tokens, added={"</s>": True, "<|endoftext|>": True})
    assert BytePairVocabulary(both).end_of_text == 0


def change(*path, value):
    """Return a function that replaces, or with `...` removes, an entry of the content."""

    def apply(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("model", value=...), "it lacks `model`"),
        (change("model", "type", value="WordPiece"), "its `model` is not BPE"),
        (change("model", "dropout", value=0.1), "its `model` has `dropout`"),
        (change("model", "unk_token", value="x"), "its `model` has `unk_token`"),
        (change("model", "vocab", value=[]), "it lacks `vocab`"),
        (change("model", "vocab", "a", value=10**9), "not numbered from 0 on without gaps"),
        (change("model", "vocab", "a", value=1.0), "not numbered from 0 on without gaps"),
        (change("model", "vocab", "猫", value=261), "its token '猫' is not made of the letters for bytes"),
        (change("model", "merges", value={}), "it lacks `merges`"),
        (change("model", "merges", 0, value="t h e"), "its merge 't h e' does not join two of its tokens"),
        (change("model", "merges", 0, value=["x", "y"]), "does not join two of its tokens"),
        (change("model", "merges", 0, value=[["x"], "y"]), "does not join two of its tokens"),
        (change("normalizer", value={"type": "NFC"}), "its `normalizer` changes texts"),
        (change("added_tokens", value={"a": 1}), "its `added_tokens` are not a list"),
        (change("added_tokens", 0, value=None), "its `added_tokens` are damaged"),
        (change("added_tokens", 0, "id", value=3), "its token '<|endoftext|>' has two numbers"),
        (change("added_tokens", 0, "lstrip", value=True), "takes spaces away"),
        (change("added_tokens", 0, "content", value="\ud800"), "is not text that UTF-8 can write"),
        (change("pre_tokenizer", value=None), "its `pre_tokenizer` is not known"),
        (change("pre_tokenizer", value={"type": "Metaspace"}), "its `pre_tokenizer` is not `ByteLevel`"),
        (change("pre_tokenizer", "add_prefix_space", value=True), "adds a space to texts"),
        (change("pre_tokenizer", "use_regex", value=False), "by exactly one pattern"),
        (
            change(
                "pre_tokenizer", value={"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": "(a+)+$"}, BYTES]}
            ),
            "its `Split` is not by the pattern of GPT-2, GPT-4 or Qwen",
        ),
    ],
)
def test_refuses_other_tokenizers_in_one_line(tmp_path, damage, message):
    content = small_content()
    damage(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        BytePairVocabulary.read(path)
    text = str(caught.value)
    assert text.startswith(f"`tokenizer` (='{path}') is not the file of a byte-level BPE tokenizer: ")
    assert message in text
    assert "\n" not in text


def test_accepts_a_known_pattern():
    content = small_content()
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}
    assert parse_tokenizer(json.dumps(content)).pattern == _GPT4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff", "is not text in UTF-8, at byte 0"),
        (b"{}", "it lacks `model`"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"the text of a book", "Expecting value"),
    ],
)
def test_refuses_other_files_in_one_line(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        BytePairVocabulary.read(path)
    assert "\n" not in str(caught.value)


def test_names_the_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        MissingDependencyError, match=r"byte-level BPE needs tokenizers, .*run `pip install .*\[text\]'`"
    ):
        BytePairVocabulary(small_tokenizer()).encode("the")
    with pytest.raises(ValueError, match=r"`vocab_size` \(=256\) must be at least 257"):
        BytePairVocabulary.train(["the"], 256)
