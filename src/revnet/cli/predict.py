"""`revnet predict`."""

import sys
from pathlib import Path
from typing import Literal

from revnet._image_files import list_images
from revnet._outside_text import encodable, printable, shorten
from revnet._result_files import writing_to
from revnet.cli._errors import UsageError, describe_error
from revnet.cli._image_lines import name_width, printable_path
from revnet.cli._out_file import open_table
from revnet.cli._streams import print_while_writing

_LONGEST_NAME = 40
"""Characters of a class name in a line; the files have the whole name."""


def predict(
    checkpoint: str,
    images: list[str],
    *,
    top: int = 5,
    csv: str | None = None,
    jsonl: str | None = None,
    device: str = "auto",
    devices: int | Literal["auto"] | None = None,
) -> None:
    """Classify images: one line per file, with the most likely classes.

    The weights are named on standard error. A file that cannot be read as an image prints an error; the other files are
    still classified, and the exit status is 1.

    Examples:
        revnet predict revnet38.digits sample
        revnet predict runs/cifar10_revnet38_1 cat.jpg dog.png
        revnet predict runs/cifar10_revnet38_1/best.safetensors photos/*.jpg --top 1
        revnet predict runs/cifar10_revnet38_1 photos --csv predictions.csv
        revnet predict runs/cifar10_revnet38_1 "photos/**/*.jpg" --jsonl predictions.jsonl

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train`, or the folder of a run, whose last weights
            are used; best.safetensors in it holds the best weights on validation.
            Or hub:owner/name, a model on the Hugging Face hub; or the name of weights that come with the package,
            such as revnet38.digits.
        images: Image files of any size and format; folders, for all images in them and in the folders inside them; or
            quoted patterns. With weights of the package, `sample` is the image that comes with them.
        top: Number of classes to print.
        csv: CSV file for the predictions, with columns for file, rank, class and probability.
        jsonl: File for the predictions with a JSON object in each line, with the file and its classes.
        device: Device to run on: auto, cpu, cuda, cuda:1, xpu, mps.
        devices: Number of devices that divide the files; auto takes all GPUs. By default, the processes that torchrun
            or SLURM has started, or one device.
    """
    table, lines = open_table("--csv", csv, b"file,rank,class,probability"), open_table("--jsonl", jsonl, b'{"file": ')
    if table is not None and table == lines:
        raise UsageError(f"`--csv` and `--jsonl` (={jsonl}) name the same file; pass another name for one of them.")
    files = list_images(images if images != ["sample"] or Path("sample").exists() else _sample_of(checkpoint))

    from revnet.training.evaluation.predict_images import predict_each, save_json_lines, save_predictions
    from revnet.training.processes.world import is_printing
    from revnet.training.run.used_weights import describe_weights

    errors = []
    is_main = is_printing()

    def report(error: Exception) -> None:
        errors.append(error)
        if is_main:
            print(f"revnet predict: error: {printable(encodable(describe_error(error)))}", file=sys.stderr)

    predictions = []
    width = name_width(files)
    with print_while_writing(not (table is None and lines is None)) as print_line:
        for prediction in predict_each(checkpoint, files, top=top, device=device, devices=devices, on_error=report):
            if not is_main:
                continue
            predictions.append(prediction)
            if len(predictions) == 1:  # on standard error, as the lines of the images may go to a file
                print(f"weights: {describe_weights(checkpoint)}", file=sys.stderr)
            answers = [
                f"{shorten(each.class_name, _LONGEST_NAME)} {100 * each.probability:.2f} %"
                for each in prediction.answers
            ]
            print_line(f"{printable_path(prediction.path):{width}}  {'  '.join(answers)}")
        if table is not None and is_main:
            with writing_to("--csv", table, "file"):
                save_predictions(predictions, table)
        if lines is not None and is_main:
            with writing_to("--jsonl", lines, "file"):
                save_json_lines(predictions, lines)
    if errors:
        raise SystemExit(1)


def _sample_of(checkpoint: str) -> list[str]:
    """Return the image that comes with weights of the package."""
    from revnet.models.pretrained.shipped import SAMPLE, find_pretrained

    folder = find_pretrained(checkpoint)
    return ["sample" if folder is None or not (folder / SAMPLE).exists() else str(folder / SAMPLE)]
