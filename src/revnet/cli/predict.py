"""`revnet predict`."""

import sys
from pathlib import Path
from typing import Literal

from revnet._outside_text import encodable, printable
from revnet.cli._errors import UsageError, describe_error


def predict(
    checkpoint: str,
    images: list[str],
    *,
    top: int = 5,
    csv: str | None = None,
    device: str = "auto",
    devices: int | Literal["auto"] | None = None,
) -> None:
    """Classify image files: one line per file, with the most likely classes.

    A file that cannot be read as an image prints an error; the other files are still classified, and the exit status
    is 2.

    Examples:
        revnet predict runs/cifar10_revnet38_1 cat.jpg dog.png
        revnet predict runs/cifar10_revnet38_1/best.safetensors photos/*.jpg --top 1
        revnet predict runs/cifar10_revnet38_1 photos/*.jpg --csv predictions.csv

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train`, or the folder of a run, whose last weights
            are used; best.safetensors in it holds the best weights on validation.
        images: Image files of any size and format.
        top: Number of classes to print.
        csv: CSV file for the predictions, with columns for file, rank, class and probability.
        device: Device to run on: auto, cpu, cuda, cuda:1, mps.
        devices: Number of devices that divide the files; auto takes all GPUs. By default, the processes that torchrun
            or SLURM has started, or one device.
    """
    table = None if csv is None else Path(csv).expanduser()
    if table is not None and (table.is_dir() or not table.parent.is_dir()):
        raise UsageError(f"`--csv` (={csv}) must be a file in a folder that exists; create the folder, or name a file.")

    from revnet.training.evaluation.predict_images import predict_each, save_predictions
    from revnet.training.processes.world import is_printing

    errors = []
    is_main = is_printing()

    def report(error: Exception) -> None:
        errors.append(error)
        if is_main:
            print(f"revnet predict: error: {printable(encodable(describe_error(error)))}", file=sys.stderr)

    predictions = []
    width = max(map(len, images))
    for prediction in predict_each(checkpoint, images, top=top, device=device, devices=devices, on_error=report):
        if not is_main:
            continue
        predictions.append(prediction)
        answers = [f"{printable(answer.class_name)} {100 * answer.probability:.2f} %" for answer in prediction.answers]
        name = printable(encodable(str(prediction.path)))
        print(f"{name:{width}}  {'  '.join(answers)}", flush=True)
    if table is not None and is_main:
        save_predictions(predictions, table)
    if errors:
        raise SystemExit(2)
