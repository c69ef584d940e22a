"""Texts of many documents."""

import json

import pytest
import torch

from revnet.data import load_text
from revnet.data.sources.documents import Documents
from revnet.errors import DataError

TEXTS = ["One.", "Zwei, ä.", "Three three three.", "4"]


def write_folder(path):
    (path / "b").mkdir(parents=True)
    (path / "a.txt").write_text(TEXTS[0])
    (path / "b" / "a.txt").write_text(TEXTS[1], encoding="utf-8")
    (path / "b" / "b.TXT").write_text(TEXTS[2], encoding="utf-8-sig")
    (path / "c.txt").write_text(TEXTS[3])
    (path / "empty.txt").write_text("")
    (path / ".hidden.txt").write_text("hidden")
    (path / "notes.md").write_text("other")
    return path


def write_lines(path, texts=TEXTS):
    path.write_text("\n\n".join(json.dumps({"text": text, "source": 3}) for text in texts) + "\n")
    return path


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.JSONL"])
def test_a_folder_and_lines_of_json_have_the_same_documents(tmp_path, name):
    folder, lines = write_folder(tmp_path / "docs"), write_lines(tmp_path / name)
    first, second = load_text(folder, val_fraction=0.5), load_text(lines, val_fraction=0.5)
    assert first.name == second.name == "docs"
    assert first.vocabulary == second.vocabulary
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)
    assert first.num_documents == (2, 2)


def test_the_end_of_text_is_around_documents(tmp_path):
    text = load_text(write_lines(tmp_path / "docs.jsonl"), val_fraction=0.2)
    decode = text.vocabulary.decode
    assert decode(text.train) == "\0One.\0Zwei, ä.\0Three three three.\0"
    assert decode(text.validation) == "\x004\0"
    assert text.vocabulary.token_bytes()[text.validation.long()].tolist() == [0, 1, 0]
    assert "3 documents train, 1 validate" in text.describe()


@pytest.mark.parametrize(
    ("sizes", "val_fraction", "num_train"),
    [
        ([1, 1], 0.1, 1),
        ([1, 1], 0.999, 1),
        ([10] * 10, 0.1, 9),
        ([10] * 10, 0.52, 5),
        ([1, 98, 1], 0.5, 2),
        ([100, 1], 0.5, 1),
    ],
)
def test_documents_are_divided_near_the_share(sizes, val_fraction, num_train):
    train, validation = Documents("x", ["a" * size for size in sizes], is_one=False).divide(val_fraction)
    assert len(train) == num_train
    assert len(train) + len(validation) == len(sizes)


def test_one_document_is_cut(tmp_path):
    text = load_text(write_lines(tmp_path / "one.jsonl", ["0123456789"]), val_fraction=0.3)
    assert text.vocabulary.decode(text.train) == "\x000123456\0"
    assert text.vocabulary.decode(text.validation) == "\x00789\0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "is empty; pass a file with some documents"),
        (b'{"text": "a"}\n{"text": "b"\n', r"has a line, 2, that is not a document: Expecting"),
        (b'{"text": 3}', r"a line, 1, that is not a document: it has no text in the field `text`"),
        (b'["a"]', r"it does not hold a JSON object"),
        (b'{"text": "a\\u0000b"}', r"its text contains the character of code 0"),
        (b'{"text": "\\ud800"}', r"its text has half of a pair of surrogates"),
        (b"[" * 100_000, r"it is nested too deeply"),
        (b"\xff", r"is not text in UTF-8, at byte 0"),
    ],
)
def test_rejects_lines_that_are_not_documents(tmp_path, content, message):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_text(path)
    assert "\n" not in str(caught.value)


def test_rejects_a_bad_file_in_a_folder(tmp_path):
    (write_folder(tmp_path / "docs") / "b" / "a.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"a.txt'\) is not a text, since it contains zero bytes"):
        load_text(tmp_path / "docs")
