"""Draw images from a fitted density, fill in missing parts of test images, and measure the fit on the test set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from revnet._checks import check_path
from revnet._outside_text import shorten
from revnet._paths import expand_user
from revnet._result_files import is_picture, make_results_folder, writing_to
from revnet._text_table import format_lines
from revnet._units import counted
from revnet.data.decoding.corrupt import OnCorrupt
from revnet.data.splits.image_split import ImageSplit
from revnet.models.pretrained.shipped import results_folder
from revnet.training.density.image_grid import save_grid
from revnet.training.density.images import load_images
from revnet.training.density.model import ImageDensity, load_density, mean_bits_per_dim
from revnet.training.device import find_device
from revnet.training.run.checkpoint import find_weights
from revnet.training.run.used_weights import describe_weights
from revnet.training.settings.checks import check_choice, check_integer

Missing = Literal["top", "bottom", "left", "right", "random"]

_NUM_INPAINTED = 20

# The paper's first step of 0.1 is too large for a density as steep as on digits, whose margins are all dark: it throws
# pixels from one bound to the other. Noise with the same weight as the gradient would be negligible.
_STEP_SIZE = 0.001
_NOISE = 10.0


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Result of sampling from a density."""

    checkpoint: Path
    """File of the weights."""

    data: str
    """Name of the data set."""

    num_test_images: int
    """Number of images in the test set."""

    test_bits_per_dim: float
    """Bits per dimension of the test set, for one draw of the noise."""

    images: Tensor
    """Samples, (N, C, H, W), uint8."""

    files: tuple[Path, ...]
    """Paths of the pictures."""

    def report(self) -> str:
        """Return the figures and the files as text."""
        lines = [
            ("weights", describe_weights(self.checkpoint)),
            (
                "test bits/dim",
                f"{self.test_bits_per_dim:.4f} ({counted(self.num_test_images, 'image')} of {self.data})",
            ),
        ]
        lines += [("" if number else "written", str(file)) for number, file in enumerate(self.files)]
        return format_lines(lines)


def sample(
    checkpoint: str | Path,
    *,
    num_samples: int = 100,
    temperature: float = 1.0,
    missing: Missing | None = None,
    num_steps: int = 500,
    step_size: float = _STEP_SIZE,
    data: str | Path | None = None,
    on_corrupt: OnCorrupt = "stop",
    seed: int = 0,
    out_dir: str | Path | None = None,
    device: str = "auto",
) -> Samples:
    """Draw images, write them as a grid, and measure the density on the test set.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train nice` has written, or the folder of a run, whose
            last weights are loaded.
        num_samples: Number of images to draw.
        temperature: Factor that codes are multiplied by.
        missing: Part of the test images to fill in, see `known_pixels`; None fills in nothing.
        num_steps: Number of steps that fill it in.
        step_size: Size of the first step, see `NICE.inpaint`.
        data: Data set of the test images, by name or path; by default the data set of the training.
        on_corrupt: Response to an image file that cannot be decoded: `stop`, or `skip` it and print its name.
        seed: Seed of the samples and the noise.
        out_dir: Folder for the pictures, which replace earlier ones; by default the folder of the checkpoint, or the
            current folder for a checkpoint from the hub or of the package.
        device: `cpu`, `cuda`, `cuda:1`, `xpu` or `mps`; `auto` takes a GPU if there is one, but never `xpu`.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or does not hold a density.
        DataError: The data set is missing or corrupt.
        ValueError: The images of `data` do not fit the model, `device` is not available, or `out_dir` cannot be
            written, or holds another file with the name of a picture.
    """
    check_path("checkpoint", checkpoint, hint="a file of weights, or the folder of a run")
    if data is not None:
        check_path("data", data, hint="the name or the path of a data set, or None for the data set of the training")
    if out_dir is not None:
        check_path("out_dir", out_dir, hint="a folder, or None for the folder of the checkpoint")
    seed = check_integer("seed", seed, at_least=0, at_most=2**32 - 1)
    if missing is not None:
        check_choice("missing", missing, get_args(Missing))
    torch_device = find_device(device)
    weights = find_weights(Path(checkpoint))
    density = load_density(weights)
    folder = results_folder(weights) if out_dir is None else expand_user(out_dir)
    name, images = _test_images(density, data, on_corrupt)
    names = ["samples.png", *([] if missing is None else [f"inpainting_{missing}.png"])]
    make_results_folder("out_dir", folder, dict.fromkeys(names, is_picture))
    files = [folder / name for name in names]
    density.to(torch_device)
    generator = torch.Generator(torch_device).manual_seed(seed)
    drawn = density.sample(num_samples, temperature=temperature, generator=generator).cpu()
    subject = f"{name}, {weights.parent.name or weights.name}"
    with writing_to("out_dir", folder):
        save_grid(drawn, files[0], title=f"{counted(num_samples, 'sample')} at temperature {temperature:g} ({subject})")
    if missing is not None:
        chosen = images[:: max(1, len(images) // _NUM_INPAINTED)][:_NUM_INPAINTED]
        mask = known_pixels(missing, density.header.image_shape, seed=seed)
        options = {"num_steps": num_steps, "step_size": step_size, "noise": _NOISE}
        filled = density.inpaint(chosen.to(torch_device), mask, generator=generator, **options).cpu()
        gray = torch.full_like(chosen, 128)
        with writing_to("out_dir", folder):
            save_grid(
                torch.cat((chosen, torch.where(mask, chosen, gray), filled)),
                files[1],
                num_columns=len(chosen),
                title=f"Test images with missing pixels filled in ({subject})",
                row_labels=("original", "known", "filled in"),
            )
    return Samples(
        checkpoint=weights,
        data=name,
        num_test_images=len(images),
        test_bits_per_dim=mean_bits_per_dim(density, images, torch_device, seed),
        images=drawn,
        files=tuple(files),
    )


def known_pixels(missing: Missing, image_shape: tuple[int, int, int], *, seed: int = 0) -> Tensor:
    """Return the mask of known pixels, (1, H, W), bool.

    One half is missing; with `random`, each pixel is missing with probability 1/2.
    """
    _, height, width = image_shape
    known = torch.ones(1, height, width, dtype=torch.bool)
    match missing:
        case "top":
            known[:, : height // 2] = False
        case "bottom":
            known[:, height - height // 2 :] = False
        case "left":
            known[..., : width // 2] = False
        case "right":
            known[..., width - width // 2 :] = False
        case "random":
            known = torch.rand(known.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return known


def _test_images(density: ImageDensity, data: str | Path | None, on_corrupt: OnCorrupt) -> tuple[str, Tensor]:
    header = density.header
    image_size = header.image_shape[1] if header.is_resized else None
    source = header.data if data is None else str(data)
    dataset = load_images(source, image_size=image_size, on_corrupt=on_corrupt)
    if not isinstance(dataset.test, ImageSplit) or dataset.test.image_shape != header.image_shape:
        shape, expected = ("x".join(map(str, sizes)) for sizes in (dataset.test.image_shape, header.image_shape))
        raise ValueError(
            f"`data` (='{dataset.name}') has images of {shape}, but the checkpoint was trained on {expected} "
            f"({shorten(header.data, 200)}); pass data like its training data."
        )
    return dataset.name, dataset.test.images
