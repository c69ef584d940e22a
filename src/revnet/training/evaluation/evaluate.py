"""Evaluate a trained classifier on a test set."""

import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from revnet._checks import check_path
from revnet._outside_text import shorten
from revnet._provenance import describe_machine
from revnet.data import ImageDataset, load_dataset, make_loader
from revnet.data.loading.loader import Loader
from revnet.errors import DataError
from revnet.training.classification.model import Classifier, ClassifierHeader, load_classifier
from revnet.training.evaluation.confusion import Confusion
from revnet.training.evaluation.evaluate_result import EvaluateResult, check_evaluation_files
from revnet.training.evaluation.new_folder import check_unseen, is_new_folder
from revnet.training.processes.choose import NumDevices, choose_world, device_of
from revnet.training.processes.join import add_up, joined
from revnet.training.processes.launch import run_in_processes
from revnet.training.processes.world import current_world
from revnet.training.run.checkpoint import find_weights
from revnet.training.settings.checks import check_integer
from revnet.training.settings.choices import OnCorrupt
from revnet.training.settings.devices import check_num_devices
from revnet.training.settings.fields import check_setting

EVALUATION_BATCH_SIZE = 500
"""Images per batch, for images up to 64x64."""

_Batch = tuple[Tensor, Tensor]


def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "stop",
    device: str = "auto",
    devices: NumDevices = None,
    out_dir: str | Path | None = None,
    show_progress: bool = False,
) -> EvaluateResult:
    """Evaluate the weights of `checkpoint` in one pass over a test set.

    Classes of the data are matched with classes of the checkpoint by name. The data may therefore have some of the
    classes only, or the same classes in another order. The classifier may still answer with any of its classes.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train` has written, or the folder of a run, whose last
            weights are loaded.
        data: Data set, by name or folder; by default the data set of the training. Of a folder of classes without
            `train`, all images are used. If it is the folder that was trained on, the images are used that were not.
        batch_size: Images per batch, on each device; by default 500, or fewer if they are larger than 64x64.
        num_workers: Processes that decode images for each device, for data that are not in memory.
        on_corrupt: Response to an image file that cannot be decoded: `stop`, or `skip` it and print its name.
        device: `cpu`, `cuda`, `cuda:1`, `xpu` or `mps`; `auto` takes a GPU if there is one, but never `xpu`.
        devices: Number of devices that divide the images; `auto` takes all GPUs. None takes the processes that torchrun
            or SLURM has started, all of which return the result, or one device.
        out_dir: Folder to which the result will be saved by `EvaluateResult.save`, which is checked before the
            evaluation; None checks nothing.
        show_progress: Whether to draw a bar, if standard error is a terminal.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or does not fit the model that it names.
        DataError: The data set is missing or corrupt.
        ValueError: The images or classes of `data` do not fit the model, `device` is not available, a number is out of
            range, or the files of the result would replace others in `out_dir`.
    """
    check_path("checkpoint", checkpoint, hint="a file of weights, or the folder of a run")
    if data is not None:
        check_path("data", data, hint="the name or the path of a data set, or None for the data set of the training")
    if out_dir is not None:
        check_path("out_dir", out_dir, hint="a folder, or None to check none")
    if batch_size is not None:
        batch_size = check_integer("batch_size", batch_size, at_least=1)
    num_workers = check_integer("num_workers", num_workers, at_least=0)
    check_setting("devices", NumDevices, devices, check_num_devices)
    arguments: dict[str, Any] = {
        "checkpoint": checkpoint,
        "data": data,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "on_corrupt": on_corrupt,
        "device": device,
        "out_dir": out_dir,
        "show_progress": show_progress,
    }
    world = choose_world(device, devices)
    if world.must_start:
        return cast("EvaluateResult", run_in_processes(_evaluate_part, arguments, world))
    return _evaluate_part(**arguments)


def _evaluate_part(
    checkpoint: str | Path,
    data: str | Path | None,
    *,
    batch_size: int | None,
    num_workers: int,
    on_corrupt: OnCorrupt,
    device: str,
    out_dir: str | Path | None,
    show_progress: bool,
) -> EvaluateResult:
    """Evaluate this process's part of the images, and return the result of all processes."""
    world = choose_world(device, None)
    with joined(world, device):
        torch_device = device_of(device, world)
        weights = find_weights(Path(checkpoint))
        classifier = load_classifier(weights)
        header = classifier.header
        dataset = load_test_data(header, data, on_corrupt)
        if out_dir is not None and world.is_main:
            check_evaluation_files(out_dir, dataset.name, weights)
        result = evaluate_on(
            dataset,
            classifier,
            torch_device,
            batch_size=batch_size,
            num_workers=num_workers,
            show_progress=show_progress and world.is_main,
        )
        command = ["revnet", "evaluate", str(checkpoint), *([] if data is None else ["--data", str(data)])]
        return replace(
            result,
            checkpoint=weights,
            split_seed=None if dataset.division is None else dataset.division.seed,
            machine=describe_machine(shlex.join(command), device=torch_device),
        )


def load_test_data(header: ClassifierHeader, data: str | Path | None, on_corrupt: OnCorrupt) -> ImageDataset:
    """Load the data set to test weights on; its training images are not used.

    Args:
        header: Header of the weights.
        data: The data set; None for the data set of the training.
        on_corrupt: Response to an image file that cannot be decoded.

    Raises:
        DataError: The data are missing, or some of their images are ones that the weights were trained on.
    """
    is_new = data is not None and is_new_folder(header, data)
    data = header.data if data is None else data
    dataset = load_dataset(
        data,
        image_size=header.image_shape[1] if header.is_resized else None,
        on_corrupt=on_corrupt,
        seed=None if is_new else header.split_seed,
    )
    if is_new:
        check_unseen(header, data)
    if dataset.division is not None and dataset.division.files != header.split_files:
        raise DataError(
            f"`data` (='{data}') does not hold the files that the weights were trained on, so that test images cannot "
            "be separated from training images; restore its files, or pass a folder with 'train' and 'test' in it."
        )
    return dataset


def evaluate_on(
    dataset: ImageDataset,
    classifier: Classifier,
    device: torch.device,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    show_progress: bool = False,
) -> EvaluateResult:
    """Evaluate `classifier` in one pass over the test images of `dataset`, which the current processes divide.

    The classifier is moved to `device` and left in evaluation mode. See `evaluate` for the arguments.
    """
    header = classifier.header
    _check_images(header, dataset)
    logit_of_label = _match_classes(header, dataset)
    batch_size = batch_size or usual_batch_size(dataset.image_size)
    world = current_world()
    loader = make_loader(
        dataset.test,
        batch_size=batch_size * world.num_processes,
        shuffle=False,
        seed=0,
        rank=world.rank,
        num_processes=world.num_processes,
        num_workers=num_workers,
    )
    batches = _with_bar(loader) if show_progress else loader
    return evaluate_batches(classifier, batches, data=dataset.name, device=device, logit_of_label=logit_of_label)


def evaluate_batches(
    classifier: Classifier,
    batches: Iterable[_Batch],
    *,
    data: str,
    device: torch.device,
    logit_of_label: Tensor | None = None,
) -> EvaluateResult:
    """Evaluate `classifier` in one pass over batches of images and labels, which the current processes divide.

    Args:
        classifier: The classifier, which is moved to `device` and left in evaluation mode.
        batches: Batches of images and labels.
        data: Name of the data.
        device: Device to compute on.
        logit_of_label: Index of the logit for each label, (K,); None if labels are the numbers of the classes.
    """
    header, world = classifier.header, current_world()
    if logit_of_label is None:
        logit_of_label = torch.arange(header.num_classes)
    start = time.perf_counter()
    counts, num_top5_errors, cross_entropy = _count(classifier.to(device).eval(), batches, logit_of_label, device)
    return EvaluateResult(
        model=header.model,
        data=data,
        confusion=Confusion(counts, header.class_names),
        num_top5_errors=num_top5_errors,
        cross_entropy=cross_entropy,
        seconds=time.perf_counter() - start,
        device=str(device) if world.num_processes == 1 else f"{world.num_processes} {device.type} devices",
    )


def usual_batch_size(image_size: tuple[int, int]) -> int:
    """Return a batch size that bounds the activations: 500 for images up to 64x64, 41 for 224x224."""
    height, width = image_size
    return max(1, min(EVALUATION_BATCH_SIZE, 2**21 // (height * width)))


@torch.no_grad()
def _count(
    classifier: Classifier, loader: Iterable[_Batch], logit_of_label: Tensor, device: torch.device
) -> tuple[Tensor, int | None, float]:
    """Return the confusions, the number of top-5 errors and the mean cross-entropy."""
    num_classes = classifier.header.num_classes
    # torchmetrics' confusion matrix needs memory for batch_size * num_classes**2 numbers on some devices, and with
    # deterministic algorithms.
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    num_top5_errors, cross_entropy = 0, 0.0
    for images, labels in loader:
        truths = logit_of_label[labels]
        logits = classifier(images.to(device)).cpu().double()
        counts.index_put_((truths, logits.argmax(dim=1)), torch.ones_like(truths), accumulate=True)
        # The true class ranks first among equal logits, and last among NaN.
        is_before = ~(logits <= logits.gather(1, truths[:, None]))
        num_top5_errors += int((is_before.sum(dim=1) >= 5).sum())
        cross_entropy += float(F.cross_entropy(logits, truths, reduction="sum"))
    sums = torch.tensor([num_top5_errors, cross_entropy], dtype=torch.float64)
    counts, sums = add_up(counts, device), add_up(sums, device)
    num_errors = int(sums[0]) if num_classes > 5 else None
    return counts, num_errors, float(sums[1]) / int(counts.sum())


def _with_bar(loader: Loader) -> Iterable[_Batch]:
    from rich.console import Console
    from rich.progress import track

    # On a terminal only, and on standard error: the figures may go to a file.
    return track(
        loader,
        "evaluating",
        len(loader),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _check_images(header: ClassifierHeader, dataset: ImageDataset) -> None:
    shape = (dataset.in_channels, *dataset.image_size)
    if shape != header.image_shape:
        raise ValueError(
            f"`data` (='{dataset.name}') has images of {_describe(shape)}, but the checkpoint was trained on "
            f"{_describe(header.image_shape)} ({shorten(header.data, 200)}); pass data like its training data."
        )


def _match_classes(header: ClassifierHeader, dataset: ImageDataset) -> Tensor:
    """Return the index of the logit for each label of `dataset`: (K,), int64."""
    if dataset.class_names == header.class_names:
        return torch.arange(header.num_classes)
    known = {name: number for number, name in enumerate(header.class_names)}
    unknown = [name for name in dataset.class_names if name not in known]
    if unknown:
        raise ValueError(
            f"`data` (='{dataset.name}') has {_list(unknown)} among its {dataset.num_classes} classes, which the "
            f"checkpoint does not know; its own {header.num_classes} ({shorten(header.data, 200)}) are "
            f"{_list(header.class_names)}. Pass data with these names."
        )
    if len(known) < header.num_classes or len(set(dataset.class_names)) < dataset.num_classes:
        raise ValueError(
            f"`data` (='{dataset.name}') has different classes from the checkpoint, and they cannot be matched by "
            "name, since two classes have the same name; pass data with the classes of the training data, in the same "
            "order."
        )
    return torch.tensor([known[name] for name in dataset.class_names])


def _list(names: Iterable[str]) -> str:
    first, *others = [f"'{shorten(name)}'" for name in names]
    shown = ", ".join([first, *others[:2]])
    return shown if len(others) <= 2 else f"{shown} and {len(others) - 2} more"


def _describe(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
