"""Damaged and forged files of weights."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from revnet.errors import CheckpointError
from revnet.training import load_classifier, load_density, load_language_model
from revnet.training.run.checkpoint import read_weights
from tests.damaged.damage import HOSTILE_VALUES, assert_ends_well, damage_bytes, damage_tree, other_file, seeded

FEW = range(20)
MANY = range(400)
_TYPES = ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", "", 3)


def forge(content: bytes, draw: random.Random) -> bytes:
    """Return a file with a header that does not describe its tensors, and without a hash."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    metadata.pop("hash")
    tensors = [name for name in header if name != "__metadata__"]
    match draw.randrange(6):
        case 0 | 1:  # one field of the header
            name = draw.choice([*metadata, "num_levels", "options", "image_shape", "class_names"])
            metadata[name] = draw.choice((json.dumps(draw.choice(HOSTILE_VALUES)), "[" * 5000, "9" * 6000, "NaN", "{"))
        case 2:  # one option inside
            name = draw.choice([name for name, text in metadata.items() if text[:1] in "[{"])
            metadata[name] = json.dumps(damage_tree(json.loads(metadata[name]), draw))
        case 3:
            header[draw.choice(tensors)]["dtype"] = draw.choice(_TYPES)
        case 4:
            header[draw.choice(tensors)]["shape"] = draw.choice(([], [0], [1], [10**9], [2**63], [2**40, 2**40], "x"))
        case 5:
            header = damage_tree(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def cases(numbers: range, *, few: range = FEW) -> list[Any]:
    return [pytest.param(few, id="few"), pytest.param(numbers, marks=pytest.mark.slow, id="many")]


LOADERS = {"classifier": load_classifier, "density": load_density, "language": load_language_model}


@pytest.fixture(params=LOADERS)
def valid(request, tmp_path) -> tuple[Path, Any]:
    name = {"classifier": "classifier_weights", "density": "density_run", "language": "language_run"}[request.param]
    path = request.getfixturevalue(name)
    return path if path.is_file() else path / "last.safetensors", LOADERS[request.param]


@pytest.mark.parametrize("numbers", cases(MANY))
def test_damaged_weights(valid, tmp_path, numbers):
    original, load = valid
    content, expected = original.read_bytes(), load_file(original)
    path = tmp_path / "damaged.safetensors"
    num_loaded = 0
    for number in numbers:
        draw = seeded(f"weights {original.name}", number)
        is_forged = number % 2 == 1
        damaged = forge(content, draw) if is_forged else damage_bytes(content, draw)
        path.write_bytes(damaged if number % 40 else other_file(draw))
        loaded = assert_ends_well(lambda: load(path), f"weights {number}")
        if not isinstance(loaded, Exception):
            num_loaded += 1
            if not is_forged:  # nothing but padding has changed
                assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert num_loaded < len(numbers)
    load(original)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("depth", 10**6, "larger than the tensors in the file|must be"),
        ("dim", 2**17, "larger than the tensors in the file|does not fit|must be"),
        ("max_length", 2**62, "was not written by `revnet train`"),
        ("num_heads", [1, 0, 0], "cannot be rebuilt"),
    ],
)
def test_language_model_that_is_larger_than_its_file(language_run, tmp_path, field, text, message):
    metadata, tensors = read_weights(language_run / "last.safetensors")
    options = json.loads(metadata["options"]) | {field: text}
    metadata = {name: value for name, value in metadata.items() if name != "hash"} | {"options": json.dumps(options)}
    path = tmp_path / "forged.safetensors"
    path.write_bytes(save(tensors, metadata))
    error = assert_ends_well(lambda: load_language_model(path), field)
    assert isinstance(error, CheckpointError)
    with pytest.raises(CheckpointError, match=message):
        load_language_model(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_shape", [10**9, 8, 8]),
        ("image_shape", [1, 0, 0]),
        ("image_shape", [[1], [8], [8]]),
        ("class_names", [str(number) for number in range(10**5)]),
        ("class_names", [1, 2, 3]),
        ("class_names", "abc"),
        ("class_names", {}),
        ("is_exact", 3),
        ("is_resized", "true"),
    ],
)
def test_classifier_with_a_forged_header(classifier_weights, tmp_path, field, value):
    metadata, tensors = read_weights(classifier_weights)
    metadata = {name: text for name, text in metadata.items() if name != "hash"} | {field: json.dumps(value)}
    path = tmp_path / "forged.safetensors"
    path.write_bytes(save(tensors, metadata))
    assert isinstance(assert_ends_well(lambda: load_classifier(path), field), CheckpointError)


def test_tensors_of_another_type_are_refused(density_run, tmp_path):
    metadata, tensors = read_weights(density_run / "last.safetensors")
    metadata = {name: text for name, text in metadata.items() if name != "hash"}
    name = next(iter(tensors))
    for dtype, is_fine in ((torch.float64, False), (torch.int32, False), (torch.bfloat16, True), (torch.half, True)):
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(save(tensors | {name: tensors[name].to(dtype)}, metadata))
        if is_fine:  # a run in bfloat16 saves such weights
            assert load_density(path).state_dict()[name].dtype == torch.float32
        else:
            with pytest.raises(CheckpointError, match=f"`{name}` is {dtype} in the file and torch.float32"):
                load_density(path)


@pytest.mark.parametrize("part", ["tensor", "header"])
def test_a_flipped_bit_is_noticed(density_run, tmp_path, part):
    content = bytearray((density_run / "last.safetensors").read_bytes())
    at = -100 if part == "tensor" else content.index(b"logistic")
    content[at] ^= 1
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its content has changed since revnet wrote it"):
        load_density(path)


@pytest.mark.parametrize("text", ["", "nonsense", "blake2b-128", "blake2b-128:", "blake2b-256:" + "0" * 64])
def test_a_malformed_hash_is_damage(density_run, tmp_path, text):
    metadata, tensors = read_weights(density_run / "last.safetensors")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(save(tensors, {**metadata, "hash": text}))
    with pytest.raises(CheckpointError, match="is damaged: its content has changed since revnet wrote it"):
        load_density(path)


def test_weights_without_a_hash_load(density_run, tmp_path):
    metadata, tensors = read_weights(density_run / "last.safetensors")
    path = tmp_path / "old.safetensors"
    path.write_bytes(save(tensors, {name: text for name, text in metadata.items() if name != "hash"}))
    expected = load_density(density_run / "last.safetensors").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_density(path).state_dict().items())
