import json

import pytest

from revnet._documents import parse_json, parse_yaml, read_json, read_yaml
from revnet.errors import CheckpointError

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, r"it has the alias \*a; write the value out"),
        ("[" * 1000, "nested more than 20 levels deep|expected"),
        ("[" * 30 + "]" * 30, "nested more than 20 levels deep"),
        ("epochs: " + "9" * 5000, "a number of more than 100 characters"),
        ("epochs: " + ":".join(["59"] * 1000), "a number of more than 100 characters"),
        ("lr: 0." + "1" * 200, "a number of more than 100 characters"),
        ("x: 2000-99-99", "month must be in"),
        ("x: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("x: \x00", "special characters are not allowed"),
        ("x: y\n" * 100_000, "more than 256 KiB"),
        ("{", "expected"),
    ],
)
def test_yaml_of_a_stranger_is_refused_in_one_line(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_yaml_of_settings():
    text = "lr: 1e-3\nepochs: 3\nlr_drops: [0.5, 0.75]\nmodel: null\ndata: ~/pets\n...\n"
    assert parse_yaml(text) == {"lr": "1e-3", "epochs": 3, "lr_drops": [0.5, 0.75], "model": None, "data": "~/pets"}


def test_yaml_file_names_itself(tmp_path):
    path = tmp_path / "config.yaml"
    for content, reason in ((b"lr: caf\xe9", "not text in UTF-8, at byte 7"), (b"3", "must hold one `setting: value`")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as caught:
            read_yaml(path)
        assert f"`{path}`" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b'{"a": NaN', b'{"a": ' + b"[" * 10**5, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\xe9"}'],
)
def test_damaged_json_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"summary.json` is damaged: .*; restore the file") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_round_trip():
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    assert parse_json(json.dumps(value)) == value
