"""Predict the classes of image files."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revnet._atomic_file import atomic_path, write_csv
from revnet._checks import check_path, check_paths
from revnet._image_files import list_images
from revnet._outside_text import csv_cell
from revnet.errors import DataError
from revnet.training.classification.model import Classifier, ClassifierHeader, load_classifier
from revnet.training.evaluation.evaluate import usual_batch_size
from revnet.training.image_data import read_image
from revnet.training.processes.choose import NumDevices, choose_world, device_of
from revnet.training.processes.join import gather, joined
from revnet.training.processes.launch import run_in_processes
from revnet.training.processes.world import current_world
from revnet.training.settings.checks import check_integer
from revnet.training.settings.devices import check_num_devices
from revnet.training.settings.fields import check_setting

_OnError = Callable[[DataError], object]


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


_Outcome = ImagePrediction | DataError


def predict_images(
    checkpoint: str | Path,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int | None = None,
    device: str = "auto",
    devices: NumDevices = None,
    on_error: _OnError | None = None,
) -> list[ImagePrediction]:
    """Classify image files of any size and kind, with the weights of `checkpoint`.

    Each image is converted to the size and channels of the training images, and cropped as in an evaluation. If the
    training images had one size, an image is resized until it covers that size, and its center is cropped. If the
    training images were resized, the central 87.5 % is kept.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train` has written, or the folder of a run, whose last
            weights are loaded.
        paths: Image files; folders, which stand for all images in them, at any depth, in the order of their names; and
            patterns such as `photos/*.jpg`.
        top: Number of classes to return for each image; all if there are fewer.
        batch_size: Images per batch; by default 500, or fewer if they are larger than 64x64.
        device: `cpu`, `cuda`, `cuda:1`, `xpu` or `mps`; `auto` takes a GPU if there is one, but never `xpu`.
        devices: Number of devices that divide the batches; `auto` takes all GPUs. None takes the processes that
            torchrun or SLURM has started, all of which return all predictions, or one device.
        on_error: Function that is called with the error of a file that cannot be read; the file is then left out. By
            default the error is raised.

    Returns:
        A prediction for every image that could be read, in the order of `paths`.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or does not fit the model that it names.
        DataError: A file is missing or not an image, and `on_error` is not given.
        TypeError: `paths` is a single path, or holds something else.
        ValueError: `device` is not available, or a number is out of range.
    """
    options: dict[str, Any] = {
        "top": top,
        "batch_size": batch_size,
        "device": device,
        "devices": devices,
        "on_error": on_error,
    }
    return list(predict_each(checkpoint, paths, **options))


def predict_each(
    checkpoint: str | Path,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int | None = None,
    device: str = "auto",
    devices: NumDevices = None,
    on_error: _OnError | None = None,
) -> Iterator[ImagePrediction]:
    """Yield the predictions of `predict_images`; on one device, each as soon as its batch is done."""
    check_path("checkpoint", checkpoint, hint="a file of weights, or the folder of a run")
    paths = check_paths("paths", paths)
    top = check_integer("top", top, at_least=1)
    if batch_size is not None:
        batch_size = check_integer("batch_size", batch_size, at_least=1)
    check_setting("devices", NumDevices, devices, check_num_devices)
    arguments: dict[str, Any] = {
        "checkpoint": checkpoint,
        "files": list_images(paths),
        "top": top,
        "batch_size": batch_size,
        "device": device,
    }
    world = choose_world(device, devices)
    if world.num_processes == 1:
        outcomes = _outcomes(**arguments)
    else:
        outcomes = iter(
            run_in_processes(_all_outcomes, arguments, world) if world.must_start else _all_outcomes(**arguments)
        )
    return _predictions(outcomes, on_error)


def _predictions(outcomes: Iterator[_Outcome], on_error: _OnError | None) -> Iterator[ImagePrediction]:
    for outcome in outcomes:
        if isinstance(outcome, ImagePrediction):
            yield outcome
        elif on_error is None:
            raise outcome
        else:
            on_error(outcome)


def _all_outcomes(
    checkpoint: str | Path, files: Sequence[Path], top: int, batch_size: int | None, device: str
) -> list[_Outcome]:
    """Predict this process's batches, and return the outcomes of all processes in the order of the files."""
    with joined(choose_world(device, None), device):
        batches = gather(list(_batch_outcomes(checkpoint, files, top, batch_size, device)))
    rounds = zip_longest(*batches, fillvalue=[])
    return [outcome for batches in rounds for outcomes in batches for outcome in outcomes]


def _outcomes(
    checkpoint: str | Path, files: Sequence[Path], top: int, batch_size: int | None, device: str
) -> Iterator[_Outcome]:
    batches = _batch_outcomes(checkpoint, files, top, batch_size, device)
    return (outcome for batch in batches for outcome in batch)


def _batch_outcomes(
    checkpoint: str | Path, files: Sequence[Path], top: int, batch_size: int | None, device: str
) -> Iterator[list[_Outcome]]:
    """Return the outcomes of this process's batches, each of which is the same for any number of processes."""
    world = current_world()
    torch_device = device_of(device, world)
    classifier = load_classifier(checkpoint).to(torch_device)
    batch_size = batch_size or usual_batch_size(classifier.header.image_shape[1:])
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    return (
        _predict_batch(classifier, batch, top, torch_device) for batch in batches[world.rank :: world.num_processes]
    )


def save_json_lines(predictions: Sequence[ImagePrediction], path: str | Path) -> None:
    """Write a JSON object for each image, one to a line: file, and the classes with their probabilities."""
    with (
        atomic_path(Path(path)) as temporary,
        # Bytes of a name that are not UTF-8 become escapes, which JSON reads as Python's name of the file.
        temporary.open("w", newline="\n", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for prediction in predictions:
            answers = [{"class": answer.class_name, "probability": answer.probability} for answer in prediction.answers]
            file.write(json.dumps({"file": str(prediction.path), "answers": answers}, ensure_ascii=False) + "\n")


def save_predictions(predictions: Sequence[ImagePrediction], path: str | Path) -> None:
    """Write a CSV file with a row for each answer: file, rank, class, probability."""
    rows = [
        [csv_cell(str(prediction.path)), rank, csv_cell(answer.class_name), answer.probability]
        for prediction in predictions
        for rank, answer in enumerate(prediction.answers, start=1)
    ]
    write_csv(Path(path), [["file", "rank", "class", "probability"], *rows])


def _predict_batch(classifier: Classifier, files: Sequence[Path], top: int, device: torch.device) -> list[_Outcome]:
    header = classifier.header
    outcomes: list[_Outcome] = []
    images = [_read(file, header) for file in files]
    readable = [image for image in images if isinstance(image, Tensor)]
    if not readable:
        return [image for image in images if isinstance(image, DataError)]
    with torch.no_grad():
        logits = classifier(torch.stack(readable).to(device))
    best = logits.float().cpu().softmax(dim=1).topk(min(top, header.num_classes))
    answers = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    for file, image in zip(files, images, strict=True):
        if isinstance(image, DataError):
            outcomes.append(image)
            continue
        probabilities, classes = next(answers)
        names = [header.class_names[number] for number in classes]
        outcomes.append(ImagePrediction(path=file, answers=tuple(map(Answer, names, probabilities))))
    return outcomes


def _read(file: Path, header: ClassifierHeader) -> Tensor | DataError:
    try:
        return read_image(file, header.image_shape, is_resized=header.is_resized)
    except DataError as error:
        return error
