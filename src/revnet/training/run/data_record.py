"""What a run remembers of its data, to refuse other data when it is resumed."""

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from revnet._atomic_file import write_text
from revnet._documents import read_json
from revnet._outside_text import encodable
from revnet.data import ImageDataset, Vocabulary
from revnet.data.sources.text import TextDataset
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.data.tokens.byte_pairs import BytePairVocabulary
from revnet.errors import CheckpointError

DataRecord = dict[str, Any]
"""Facts about the data by their description; texts that begin with `blake2b` are fingerprints."""

_FINGERPRINT = "blake2b:"
_CHARACTERS = "characters"
_TOKENIZER = "tokenizer"


def record_images(dataset: ImageDataset) -> DataRecord:
    """Return the record of a data set of images: classes, numbers, and fingerprints.

    The fingerprint of images in memory covers every byte, the one of image files covers names, sizes and classes.
    """
    record: DataRecord = {"number of classes": dataset.num_classes}
    record |= {f"name of class {number}": name for number, name in enumerate(dataset.class_names)}
    for noun, split in (("training images", dataset.train), ("test images", dataset.test)):
        record |= _record_split(noun, split, dataset.class_names)
    return record


def record_text(dataset: TextDataset) -> DataRecord:
    """Return the record of a text: its characters or its tokenizer, and a fingerprint."""
    tokens, vocabulary = (dataset.train.numpy(), dataset.validation.numpy()), dataset.vocabulary
    tokenizer: DataRecord = {}
    if isinstance(vocabulary, Vocabulary):
        tokenizer = {_CHARACTERS: vocabulary.characters}
    elif isinstance(vocabulary, BytePairVocabulary):
        tokenizer = {_TOKENIZER: _fingerprint(np.frombuffer(vocabulary.file.to_json().encode(), np.uint8))}
    return {
        **tokenizer,
        f"number of {vocabulary.noun}s": sum(map(len, tokens)),
        "text": _fingerprint(*tokens),
    }


def save_record(record: DataRecord, path: Path) -> None:
    """Write a record as JSON."""
    # Other letters are readable as they are, and a name that is not UTF-8 can only be escaped.
    is_text = all(part == encodable(part) for part in (*record, *map(str, record.values())))
    write_text(path, json.dumps(record, indent=2, ensure_ascii=not is_text) + "\n")


def check_record(record: DataRecord, path: Path, data: str) -> None:
    """Compare the record of the data at hand with the one of the run, at `path`.

    Args:
        record: Record of the data at hand.
        path: File with the record of the run.
        data: The data, for the message.

    Raises:
        CheckpointError: The data differ; the message names the first difference.
    """
    if not path.is_file():
        return
    earlier = read_json(path)
    difference = _first_difference(earlier, record)
    if difference is not None:
        raise CheckpointError(
            f"`data` (='{data}') is not what the run was trained on: {difference}; restore the data, or start a new "
            "run."
        )


def _record_split(noun: str, split: AbstractSplit, class_names: tuple[str, ...]) -> DataRecord:
    record: DataRecord = {f"number of {noun}": len(split)}
    if isinstance(split, ImageSplit):
        record[f"shape of the {noun}"] = "x".join(map(str, split.image_shape))
        record[f"pixels of the {noun}"] = _fingerprint(split.images.numpy())
    if isinstance(split, FileSplit):
        files: dict[int, list[str]] = {}
        for index, label in enumerate(split.labels.tolist()):
            files.setdefault(label, []).append(split.file(index))
        for label, names in sorted(files.items()):
            record[f"number of {noun} of class {class_names[label]}"] = len(names)
            record[f"files of the {noun} of class {class_names[label]}"] = _fingerprint_files(names)
    if split.labels is not None:
        record[f"labels of the {noun}"] = _fingerprint(split.labels.numpy())
    return record


def _fingerprint(*arrays: np.ndarray) -> str:
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return f"{_FINGERPRINT}{digest.hexdigest()}"


def _fingerprint_files(files: list[str]) -> str:
    # Without the folder of the data set, which may move.
    lines = sorted(f"{Path(file).name} {os.stat(file).st_size}" for file in files)  # noqa: PTH116 - a million of them
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    return f"{_FINGERPRINT}{blake2b(text, digest_size=16).hexdigest()}"


def _first_difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if (_TOKENIZER in earlier) != (_TOKENIZER in now):
        return "its tokens are of another kind"
    for fact in [*earlier, *(fact for fact in now if fact not in earlier)]:
        old, new = earlier.get(fact), now.get(fact)
        if old == new:
            continue
        if fact == _CHARACTERS and isinstance(old, str) and isinstance(new, str):
            character = next(c for c in sorted({*old, *new}) if (c in old) != (c in new))
            return f"the character {character!r} is {'new' if character in new else 'missing'}"
        if str(old).startswith(_FINGERPRINT) and str(new).startswith(_FINGERPRINT):
            return f"the {fact} {'differs' if fact in ('text', _TOKENIZER) else 'differ'}"
        return f"the {fact} is {new}, and was {old}"
    return None
