"""Predict the classes of image files."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from revnet.data import load_image
from revnet.errors import DataError
from revnet.training.atomic_file import atomic_path
from revnet.training.classification.model import Classifier, ClassifierHeader, load_classifier
from revnet.training.device import find_device
from revnet.training.evaluation.evaluate import usual_batch_size
from revnet.training.settings.checks import check_integer

_OnError = Callable[[DataError], object]

_TEST_CROP = 0.875  # the share of a test image that `load_dataset` keeps when it resizes


class Answer(NamedTuple):
    """A class, and its probability."""

    class_name: str
    """Name of the class."""

    probability: float
    """Probability from 0 to 1; the probabilities of all classes sum to 1."""


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """Prediction of a classifier for one image."""

    path: Path
    """Path of the image file, as given."""

    answers: tuple[Answer, ...]
    """The most probable classes, in descending order of probability."""


def predict_images(
    checkpoint: str | Path,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int | None = None,
    device: str = "auto",
    on_error: _OnError | None = None,
) -> list[ImagePrediction]:
    """Classify image files of any size and kind, with the weights of `checkpoint`.

    Each image is converted to the size and channels of the training images, and cropped as in an evaluation. If the
    training images had one size, an image is resized until it covers that size, and its center is cropped. If the
    training images were resized, the central 87.5 % is kept.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train` has written, or the folder of a run, whose last
            weights are loaded.
        paths: Image files.
        top: Number of classes to return for each image; all if there are fewer.
        batch_size: Images per batch; by default 500, or fewer if they are larger than 64x64.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes a GPU if there is one.
        on_error: Function that is called with the error of a file that cannot be read; the file is then left out. By
            default the error is raised.

    Returns:
        A prediction for every file that could be read, in the order of `paths`.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or does not fit the model that it names.
        DataError: A file is missing or not an image, and `on_error` is not given.
        TypeError: `paths` is a single path.
        ValueError: `device` is not available, or a number is out of range.
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
) -> Iterator[ImagePrediction]:
    """Yield the predictions of `predict_images`, each as soon as its batch is done."""
    if isinstance(paths, str | Path):
        raise TypeError(f"`paths` (='{paths}') must be a list of files; pass ['{paths}'].")
    check_integer("top", top, at_least=1)
    if batch_size is not None:
        check_integer("batch_size", batch_size, at_least=1)
    torch_device = find_device(device)
    classifier = load_classifier(checkpoint).to(torch_device)
    files = [Path(path) for path in paths]
    batch_size = batch_size or usual_batch_size(classifier.header.image_shape[1:])
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    return (
        prediction for batch in batches for prediction in _predict_batch(classifier, batch, top, torch_device, on_error)
    )


def save_predictions(predictions: Sequence[ImagePrediction], path: str | Path) -> None:
    """Write a CSV file with a row for each answer: file, rank, class, probability."""
    with (
        atomic_path(Path(path)) as temporary,
        # A file name may hold any bytes.
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["file", "rank", "class", "probability"])
        for prediction in predictions:
            for rank, answer in enumerate(prediction.answers, start=1):
                writer.writerow([prediction.path, rank, answer.class_name, answer.probability])


def _predict_batch(
    classifier: Classifier, files: Sequence[Path], top: int, device: torch.device, on_error: _OnError | None
) -> Iterator[ImagePrediction]:
    images = [(file, image) for file in files if (image := _read(file, classifier.header, on_error)) is not None]
    if not images:
        return
    header = classifier.header
    with torch.no_grad():
        logits = classifier(torch.stack([image for _, image in images]).to(device))
    best = logits.float().cpu().softmax(dim=1).topk(min(top, header.num_classes))
    for (file, _), probabilities, classes in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
        names = [header.class_names[number] for number in classes]
        yield ImagePrediction(path=file, answers=tuple(map(Answer, names, probabilities)))


def _read(file: Path, header: ClassifierHeader, on_error: _OnError | None) -> Tensor | None:
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
