import pytest
import torch

from revnet.data import Vocabulary, load_text
from revnet.errors import DataError

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🎉\n" * 3


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_end_of_a_text_is_for_validation(file):
    dataset = load_text(file, val_fraction=0.25)
    assert dataset.name == "a text"
    assert len(dataset.validation) == len(TEXT) - len(dataset.train) == round(0.25 * len(TEXT))
    assert dataset.vocabulary == Vocabulary.of(TEXT)
    decode = dataset.vocabulary.decode
    assert decode(dataset.train) + decode(dataset.validation) == TEXT


def test_encoding_and_decoding_are_inverse():
    vocabulary = Vocabulary.of(TEXT)
    tokens = vocabulary.encode("Deich 🎉")
    assert tokens.dtype == torch.int64
    assert vocabulary.decode(tokens) == "Deich 🎉"
    assert list(vocabulary.characters) == sorted(set(TEXT))


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"`prompt` has the character 'x', which is not among the 2 .*: 'ab'"):
        Vocabulary.of("ab").encode("bax", "prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; pass a text file with some content"),
        (b"\x89PNG\r\n\xff", r"is not text in UTF-8, at byte 0; pass a text file, or convert it"),
        (b"ab\x00cd", r"is not a text, since it contains zero bytes"),
    ],
)
def test_rejects_other_files_with_one_line(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_text(path)
    assert "\n" not in str(caught.value)


def test_rejects_missing_files(tmp_path):
    with pytest.raises(DataError, match="does not exist; pass a text file"):
        load_text(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"is a folder without a .txt file with some content; pass a text file"):
        load_text(tmp_path)
