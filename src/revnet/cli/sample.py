"""`revnet sample`."""

from typing import Literal

from revnet.training.settings.choices import OnCorrupt

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
    on_corrupt: OnCorrupt = "stop",
    seed: int = 0,
    out_dir: str | None = None,
    device: str = "auto",
) -> None:
    """Sample images from a density fitted by `revnet train nice`.

    Prints the bits per dimension on the test set, and writes a grid of samples to `samples.png`. With `--inpaint`, also
    writes `inpainting_<part>.png`, which shows test images, the same images with a part missing, and the same images
    with that part filled in by gradient ascent on the density.

    Examples:
        revnet sample runs/digits_nice_1
        revnet sample runs/digits_nice_1 --inpaint left --temperature 0.8
        revnet sample runs/cifar10_nice_1/best.safetensors --num 64 --out-dir pictures

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train nice`, or the folder of a run, whose last
            weights are used; best.safetensors in it holds the best weights on validation.
            Or hub:owner/name, a model on the Hugging Face hub; or the name of weights that come with the package.
        num: Number of images to sample.
        temperature: Factor that scales the latent codes. Below 1, samples are more likely and less varied.
        inpaint: Part of the test images to remove and fill in: top, bottom, left, right, or random for half of the
            pixels.
        steps: Number of steps of the gradient ascent.
        step_size: Size of the first step; lower it if the filled parts come out black and white.
        data: Data set of the test images, by name or path; by default, the data set of the run.
        on_corrupt: How to treat an image that cannot be decoded: stop, or skip it with a warning.
        seed: Seed of the samples and of the noise.
        out_dir: Folder for the pictures, which replace earlier ones only; by default the folder of the checkpoint, or
            the current folder for weights from the hub or of the package.
        device: Device to run on: auto, cpu, cuda, cuda:1, xpu, mps.
    """
    from revnet.training.settings.checks import check_integer, check_number

    check_integer("--num", num, at_least=1)
    check_integer("--steps", steps, at_least=1)
    check_integer("--seed", seed, at_least=0, at_most=2**32 - 1)
    check_number("--step-size", step_size, "above 0", lambda x: x > 0, "0.001 is usual")
    check_number("--temperature", temperature, "0 or more", lambda x: x >= 0, "1 samples from the model unchanged")

    from revnet import training

    result = training.sample(
        checkpoint,
        num_samples=num,
        temperature=temperature,
        missing=inpaint,
        num_steps=steps,
        step_size=step_size,
        data=data,
        on_corrupt=on_corrupt,
        seed=seed,
        out_dir=out_dir,
        device=device,
    )
    print(result.report())
