"""`revnet export`."""

import sys
from typing import Literal

from revnet._paths import expand_user
from revnet._result_files import writing_to
from revnet.cli._out_file import check_out_file

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
            Or hub:owner/name, a model on the Hugging Face hub; or the name of weights that come with the package, such
            as revnet38.digits.
        format: onnx for onnxruntime and other programs, or pt2 for `torch.export.load`.
        out: File to write; by default, the name of the weights with the suffix of the format, in their folder, or in
            the current folder for weights on the hub or of the package.
    """
    from revnet.models.pretrained.shipped import packaged_name, results_folder
    from revnet.training.export.inference import read_inference
    from revnet.training.export.write import is_inference_file, write_inference
    from revnet.training.run.checkpoint import find_weights
    from revnet.training.run.used_weights import describe_weights

    weights = find_weights(expand_user(checkpoint))
    name = f"{packaged_name(weights) or weights.stem}{_SUFFIXES[format]}"
    path = results_folder(weights) / name if out is None else expand_user(out)
    check_out_file("--out", path, is_inference_file)
    with writing_to("--out", path, "file"):
        report = write_inference(read_inference(weights), path, format)
    lines = sys.stderr if path.is_relative_to("/dev") else sys.stdout  # the file itself may go to /dev/stdout
    print(f"weights: {describe_weights(checkpoint)}", file=lines)
    print(report, file=lines)
