"""Count the errors that a trained classifier makes."""

from __future__ import annotations

from pathlib import Path

import torch

from revnet.data import ImageDataset, ImageSplit, load_dataset, make_loader
from revnet.training._checkpoint import load_classifier
from revnet.training.classifier import Classifier
from revnet.training.results import EvaluateResult

EVALUATION_BATCH_SIZE = 500


def evaluate(checkpoint: str | Path, data: str | None = None) -> EvaluateResult:
    """Read the test set once, with the weights of `checkpoint`.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train` has written, or the folder of a run, whose last
            weights are taken.
        data: Data set, by name or folder; the one trained on if not given.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or does not fit the model that it names.
        DataError: The data set is missing or corrupt.
        ValueError: The images or classes of `data` are not those that the model was made for.
    """
    classifier = load_classifier(checkpoint)
    dataset = load_dataset(classifier.header.data if data is None else data)
    _check_match(classifier, dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate_on(dataset, classifier, device)


def evaluate_on(dataset: ImageDataset, classifier: Classifier, device: torch.device) -> EvaluateResult:
    """Read the test images of `dataset` once; `classifier` is moved to `device` and left in evaluation mode."""
    return EvaluateResult(
        model=classifier.header.model,
        data=dataset.name,
        num_images=len(dataset.test),
        num_errors=count_errors(classifier.to(device).eval(), dataset.test, device),
    )


@torch.no_grad()
def count_errors(classifier: Classifier, split: ImageSplit, device: torch.device) -> int:
    """Count the images of `split` that are put into a wrong class."""
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in make_loader(split, batch_size=EVALUATION_BATCH_SIZE, shuffle=False, seed=0):
        wrong += (classifier(images.to(device)).argmax(dim=1) != labels.to(device)).sum()
    return int(wrong)


def _check_match(classifier: Classifier, dataset: ImageDataset) -> None:
    header = classifier.header
    made_for = f"{_describe(header.image_shape)} images of {header.num_classes} classes ({header.data})"
    given_shape = (dataset.in_channels, *dataset.image_size)
    if given_shape != header.image_shape or dataset.num_classes != header.num_classes:
        raise ValueError(
            f"`data` (={dataset.name!r}) has {_describe(given_shape)} images of {dataset.num_classes} classes, but the "
            f"checkpoint was made for {made_for}; pass the data set that it was trained on."
        )


def _describe(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
