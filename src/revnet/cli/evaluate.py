"""`revnet evaluate`."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

from revnet.cli._step_flags import open_folder
from revnet.cli._streams import print_while_writing
from revnet.errors import CheckpointError, MissingDependencyError
from revnet.training.settings.choices import OnCorrupt


def evaluate(
    checkpoint: str,
    *,
    data: str | None = None,
    out_dir: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "stop",
    device: str = "auto",
    devices: int | Literal["auto"] | None = None,
) -> None:
    """Test a checkpoint: errors, hardest classes, confusions.

    Prints a summary, and writes the results of every class to `evaluation_<data>.json` and `.csv`, and a picture of the
    confusions to `.png`. They replace files of an earlier evaluation, and no others.

    Examples:
        revnet evaluate runs/digits_revnet38_1
        revnet evaluate runs/digits_revnet38_1/best.safetensors --out-dir evaluations
        revnet evaluate runs/imagenet_revnet56_1 --data path/to/imagenet --num-workers 8

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train`, or the folder of a run, whose last weights
            are used; best.safetensors in it holds the best weights on validation.
            Or hub:owner/name, a model on the Hugging Face hub; or the name of weights that come with the package.
        data: Data set, by name or path; by default, the data set of the run. Its test images are used, and
            classes are matched by name.
        out_dir: Folder for the results; by default the folder of the checkpoint, or the current folder for weights from
            the hub or of the package.
        batch_size: Images per batch, on each device; 500 by default, fewer for images larger than 64x64.
        num_workers: Processes that decode images for each device, if the data are not held in memory.
        on_corrupt: How to treat an image that cannot be decoded: stop, or skip it with a warning.
        device: Device to run on: auto, cpu, cuda, cuda:1, xpu, mps.
        devices: Number of devices that divide the images; auto takes all GPUs. By default, the processes that torchrun
            or SLURM has started, or one device.
    """
    if out_dir is not None:
        open_folder(out_dir)  # fails now rather than after an hour

    from revnet import training
    from revnet.models.pretrained.shipped import results_folder
    from revnet.training.evaluation.evaluation_report import report_evaluation
    from revnet.training.processes.world import is_printing
    from revnet.training.run.checkpoint import find_weights

    folder = out_dir
    if folder is None:
        with suppress(CheckpointError):  # `training.evaluate` raises it, after the errors of other arguments.
            folder = str(results_folder(find_weights(Path(checkpoint))))
    result = training.evaluate(
        checkpoint,
        data,
        batch_size=batch_size,
        num_workers=num_workers,
        on_corrupt=on_corrupt,
        device=device,
        devices=devices,
        out_dir=folder,
        show_progress=True,
    )
    if not is_printing():
        return
    with print_while_writing() as print_line:
        print_line(report_evaluation(result))
        files = result.save(folder)
        for number, file in enumerate(files):
            print_line(f"{'' if number else 'written':13}  {file}")
        if all(file.suffix != ".png" for file in files):
            print_line(f"{'no picture':13}  {MissingDependencyError.of('matplotlib', 'a figure')}")
