"""`revnet evaluate`."""

from __future__ import annotations


def evaluate(checkpoint: str, *, data: str | None = None) -> None:
    """Print the test error of a checkpoint.

    Examples:
        revnet evaluate runs/digits_revnet38_1
        revnet evaluate runs/digits_revnet38_1/best.safetensors

    Args:
        checkpoint: A .safetensors or .ckpt file that `revnet train` has written, or the folder of a run, whose last
            weights are taken.
        data: Data set, by name or folder; the one trained on if not given.
    """
    from revnet import training

    result = training.evaluate(checkpoint, data)
    print(f"{result.model} on the test images of {result.data}: {result.report()}")
