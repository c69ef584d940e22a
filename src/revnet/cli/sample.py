"""`revnet sample`."""

from __future__ import annotations

from typing import Literal

Missing = Literal["top", "bottom", "left", "right", "random"]


def sample(
    checkpoint: str,
    *,
    num: int = 100,
    temperature: float = 1.0,
    inpaint: Missing | None = None,
    steps: int = 500,
    step_size: float = 0.001,
    data: str | None = None,
    seed: int = 0,
    output_dir: str | None = None,
    device: str = "auto",
) -> None:
    """Draw images from a density that `revnet train nice` has fitted, and say how well it fits the test set.

    Writes a grid of samples as `samples.png`; with `--inpaint` also `inpainting_<part>.png`: rows of test images, the
    same with a part missing, and with that part filled in by climbing the density. Prints bits per dimension on the
    test set.

    Examples:
        revnet sample runs/digits_nice_1
        revnet sample runs/digits_nice_1 --inpaint left --temperature 0.8
        revnet sample runs/cifar10_nice_1/last.safetensors --num 64 --output-dir pictures

    Args:
        checkpoint: A .safetensors or .ckpt file that `revnet train nice` has written, or the folder of a run, whose
            best weights are taken.
        num: How many images to draw.
        temperature: What codes are multiplied by: below 1, images that are likelier and less varied.
        inpaint: The part of test images that is missing, to be filled in: top, bottom, left, right, or random for half
            of the pixels.
        steps: Steps of the climb.
        step_size: How far the first of them goes; less where the filled parts come out black and white.
        data: Data set, by name or path, to read the test images from; the one trained on if not given.
        seed: Which samples, and which noise.
        output_dir: Folder for the pictures; that of the checkpoint if not given.
        device: Where to compute: auto, cpu, cuda, cuda:1, mps.
    """
    from revnet.training.checks import check_integer, check_number

    check_integer("num", num, at_least=1)
    check_integer("steps", steps, at_least=1)
    check_integer("seed", seed, at_least=0, at_most=2**32 - 1)
    check_number("step_size", step_size, "above 0", lambda x: x > 0, "0.001 is usual")
    check_number("temperature", temperature, "0 or more", lambda x: x >= 0, "1 draws as the model was fitted")

    from revnet import training

    result = training.sample(
        checkpoint,
        num_samples=num,
        temperature=temperature,
        missing=inpaint,
        num_steps=steps,
        step_size=step_size,
        data=data,
        seed=seed,
        output_dir=output_dir,
        device=device,
    )
    print(result.report())
