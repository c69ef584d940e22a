"""`revnet evaluate`."""

from __future__ import annotations

from pathlib import Path

from revnet.training.choices import OnCorrupt


def evaluate(
    checkpoint: str,
    *,
    data: str | None = None,
    output_dir: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "stop",
    device: str = "auto",
) -> None:
    """Read the test set with a checkpoint: errors, the hardest classes, what is taken for what.

    Prints the figures, and writes them with those of every class: `evaluation_<data>.json`, `.csv` and, a picture of
    the confusions, `.png`.

    Examples:
        revnet evaluate runs/digits_revnet38_1
        revnet evaluate runs/digits_revnet38_1/best.safetensors --output-dir evaluations
        revnet evaluate runs/imagenet_revnet56_1 --data path/to/imagenet --num-workers 8

    Args:
        checkpoint: A .safetensors or .ckpt file that `revnet train` has written, or the folder of a run, whose last
            weights are taken.
        data: Data set, by name or folder; the one trained on if not given. Its classes are matched by name.
        output_dir: Folder for the files; that of the checkpoint if not given.
        batch_size: Images at a time; 500 if not given, fewer if they are larger than 64x64.
        num_workers: Processes that decode images, for data that are not held in memory.
        on_corrupt: What to do about an image file that cannot be decoded: stop, or skip it and say so.
        device: Where to compute: auto, cpu, cuda, cuda:1, mps.
    """
    if output_dir is not None:
        Path(output_dir).expanduser().mkdir(parents=True, exist_ok=True)  # told now, not after an hour

    from revnet import training
    from revnet.training.evaluation.evaluation_report import report_evaluation

    result = training.evaluate(
        checkpoint,
        data,
        batch_size=batch_size,
        num_workers=num_workers,
        on_corrupt=on_corrupt,
        device=device,
        show_progress=True,
    )
    print(report_evaluation(result), flush=True)
    for number, file in enumerate(result.save(output_dir)):
        print(f"{'' if number else 'written':13}  {file}")
