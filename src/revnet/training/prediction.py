"""Name what is in image files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from revnet.data import load_image
from revnet.errors import DataError
from revnet.training._checkpoint import load_classifier
from revnet.training._checks import check_integer
from revnet.training._device import find_device
from revnet.training._files import atomic_path
from revnet.training.classifier import Classifier, Header
from revnet.training.evaluation import usual_batch_size

_OnError = Callable[[DataError], object]

_TEST_CROP = 0.875  # what `load_dataset` keeps of test images that it resizes


class Answer(NamedTuple):
    """A class, and how likely the classifier finds it."""

    class_name: str
    """Name of the class."""

    probability: float
    """From 0 to 1; those of all classes add up to 1."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a classifier says of one image."""

    path: Path
    """The image file, as it was given."""

    answers: tuple[Answer, ...]
    """The likeliest classes, the best first."""


def predict(
    checkpoint: str | Path,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int | None = None,
    device: str = "auto",
    on_error: _OnError | None = None,
) -> list[Prediction]:
    """Classify image files of any size and kind, with the weights of `checkpoint`.

    An image is brought to the size and the channels of those that the model was trained on, and cut as they are in an
    evaluation: for data of one size it is resized until it covers that, and its middle is taken; for data that were
    resized themselves, 87.5 % of its middle.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train` has written, or the folder of a run, whose last
            weights are taken.
        paths: The files.
        top: How many classes to name, at most; all if there are fewer.
        batch_size: Images at a time; 500 if not given, fewer if they are larger than 64x64.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes a GPU if there is one.
        on_error: Called with the error of a file that cannot be read, which is then left out. Without it, the error is
            raised.

    Returns:
        A prediction for every file that could be read, in the order of `paths`.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or does not fit the model that it names.
        DataError: A file is missing or no image, and `on_error` is not given.
        TypeError: `paths` is a single path.
        ValueError: `device` is not there, or a number is out of range.
    """
    return list(predict_each(checkpoint, paths, top=top, batch_size=batch_size, device=device, on_error=on_error))


def predict_each(
    checkpoint: str | Path,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int | None = None,
    device: str = "auto",
    on_error: _OnError | None = None,
) -> Iterator[Prediction]:
    """Do what `predict` does, and give each prediction as soon as its batch is done."""
    if isinstance(paths, str | Path):
        raise TypeError(f"`paths` (='{paths}') must be a list of files; pass ['{paths}'].")
    check_integer("top", top, at_least=1)
    if batch_size is not None:
        check_integer("batch_size", batch_size, at_least=1)
    place = find_device(device)
    classifier = load_classifier(checkpoint).to(place)
    files = [Path(path) for path in paths]
    batch_size = batch_size or usual_batch_size(classifier.header.image_shape[1:])
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    return (prediction for batch in batches for prediction in _predict_batch(classifier, batch, top, place, on_error))


def save_predictions(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Write a row for each answer: file, rank, class, probability."""
    with (
        atomic_path(Path(path)) as temporary,
        # Names of files are bytes, and any will do.
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["file", "rank", "class", "probability"])
        for prediction in predictions:
            for rank, answer in enumerate(prediction.answers, start=1):
                writer.writerow([prediction.path, rank, answer.class_name, answer.probability])


def _predict_batch(
    classifier: Classifier, files: Sequence[Path], top: int, device: torch.device, on_error: _OnError | None
) -> Iterator[Prediction]:
    images = [(file, image) for file in files if (image := _read(file, classifier.header, on_error)) is not None]
    if not images:
        return
    header = classifier.header
    with torch.no_grad():
        logits = classifier(torch.stack([image for _, image in images]).to(device))
    best = logits.float().cpu().softmax(dim=1).topk(min(top, header.num_classes))
    for (file, _), probabilities, places in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
        names = [header.class_names[place] for place in places]
        yield Prediction(path=file, answers=tuple(map(Answer, names, probabilities)))


def _read(file: Path, header: Header, on_error: _OnError | None) -> Tensor | None:
    try:
        return load_image(
            file,
            image_size=header.image_shape[1:],
            in_channels=header.in_channels,
            crop_fraction=_TEST_CROP if header.is_resized else 1.0,
        )
    except DataError as error:
        if on_error is None:
            raise
        on_error(error)
        return None
