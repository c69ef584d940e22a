"""`revnet export`."""

import sys
from pathlib import Path
from typing import Literal

from revnet.cli._errors import UsageError

_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}


def export(checkpoint: str, *, format: Literal["onnx", "pt2"] = "onnx", out: str | None = None) -> None:
    """Write the model of a run to a file that programs without revnet can run.

    The file takes a batch of any size. A classifier maps images, as they were loaded, to logits; a language model maps
    tokens to logits; a density maps images to their log-density. The metadata of the file describe the input and the
    output: labels, size of the images, mean and standard deviation.

    The outputs of the file are compared with PyTorch's at batch sizes 1 and 7. The largest difference is printed,
    relative to the largest output. If it is above 1e-5, no file is written and the exit status is 2.

    Examples:
        revnet export runs/digits_revnet38_1
        revnet export runs/digits_revnet38_1/best.safetensors --format pt2 --out digits.pt2

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train`, or the folder of a run, whose last weights
            are used; best.safetensors in it holds the best weights on validation.
        format: onnx for onnxruntime and other programs, or pt2 for `torch.export.load`.
        out: File to write; by default, the name of the weights with the suffix of the format, in the same folder, or
            in the current one for weights on the hub.
    """
    from revnet.models.pretrained.hub_files import is_hub_name
    from revnet.training.export.inference import read_inference
    from revnet.training.export.write import write_inference
    from revnet.training.run.checkpoint import find_weights
    from revnet.training.run.used_weights import describe_weights

    weights = find_weights(Path(checkpoint).expanduser())
    local = Path(weights.name) if is_hub_name(checkpoint) else weights  # The cache of downloads is not for files.
    path = local.with_suffix(_SUFFIXES[format]) if out is None else Path(out).expanduser()
    _check_place(path, out)
    report = write_inference(read_inference(weights), path, format)
    lines = sys.stderr if path.is_relative_to("/dev") else sys.stdout  # the file itself may go to /dev/stdout
    print(f"weights: {describe_weights(checkpoint)}", file=lines)
    print(report, file=lines)


def _check_place(path: Path, out: str | None) -> None:
    """Raise unless `path` may be written to."""
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"`--out` (={out}) must be a file in a folder that exists; create the folder, or name a file.")
    if path.suffix.lower() in (".safetensors", ".ckpt"):
        raise UsageError(f"`--out` (={out}) is the name of weights, which the file would replace; pass another name.")
