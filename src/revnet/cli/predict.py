"""`revnet predict`."""

from __future__ import annotations

import sys
from pathlib import Path


def predict(checkpoint: str, images: list[str], *, top: int = 5, csv: str | None = None, device: str = "auto") -> None:
    """Name what is in image files: a line for each, with the likeliest classes.

    A file that is no image is told in a line of its own; the others are still classified, and the exit code is 2.

    Examples:
        revnet predict runs/cifar10_revnet38_1 cat.jpg dog.png
        revnet predict runs/cifar10_revnet38_1/best.safetensors photos/*.jpg --top 1 --csv answers.csv

    Args:
        checkpoint: A .safetensors or .ckpt file that `revnet train` has written, or the folder of a run, whose last
            weights are taken.
        images: Image files, of any size and kind.
        top: How many classes to name.
        csv: File for the answers, a row for each: file, rank, class, probability.
        device: Where to compute: auto, cpu, cuda, cuda:1, mps.
    """
    table = None if csv is None else Path(csv).expanduser()
    if table is not None and (table.is_dir() or not table.parent.is_dir()):
        raise ValueError(f"`--csv` (={csv}) must be a file in a folder that exists; make the folder, or name a file.")

    from revnet.training.evaluation.predict_images import predict_each, save_predictions

    errors = []

    def tell(error: Exception) -> None:
        errors.append(error)
        print(f"revnet predict: error: {error}", file=sys.stderr)

    predictions = []
    width = max(map(len, images))
    for prediction in predict_each(checkpoint, images, top=top, device=device, on_error=tell):
        predictions.append(prediction)
        answers = "  ".join(f"{answer.class_name} {100 * answer.probability:.2f} %" for answer in prediction.answers)
        name = str(prediction.path).encode(errors="replace").decode()  # bytes that are no text cannot be printed
        print(f"{name:{width}}  {answers}", flush=True)
    if table is not None:
        save_predictions(predictions, table)
    if errors:
        raise SystemExit(2)
