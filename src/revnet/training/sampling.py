"""Draw images from a fitted density, fill in what is missing in others, and say how well it fits the test set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from revnet.data import ImageSplit, load_dataset
from revnet.training._checkpoint import find_weights
from revnet.training._checks import check_choice
from revnet.training._device import find_device
from revnet.training._image_grid import save_grid
from revnet.training.density import ImageDensity, load_density
from revnet.training.density_job import mean_bits_per_dim
from revnet.training.run_result import format_lines

Missing = Literal["top", "bottom", "left", "right", "random"]

_NUM_INPAINTED = 20

# The paper's first step of 0.1 throws pixels from one bound to the other where a density is as steep as that of
# digits, whose margins are dark to a level; and noise that is weighted like the gradient vanishes beside it.
_STEP_SIZE = 0.001
_NOISE = 10.0


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What came out of sampling."""

    checkpoint: Path
    """File of the weights."""

    data: str
    """Name of the data set."""

    num_test_images: int
    """Images in the test set."""

    test_bits_per_dim: float
    """Of the test set, for one draw of the noise."""

    images: Tensor
    """The samples, (N, C, H, W), uint8."""

    files: tuple[Path, ...]
    """The pictures."""

    def report(self) -> str:
        """Say it on the screen."""
        lines = [
            ("weights", str(self.checkpoint)),
            ("test bits/dim", f"{self.test_bits_per_dim:.4f} ({self.num_test_images:,} images of {self.data})"),
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
    seed: int = 0,
    output_dir: str | Path | None = None,
    device: str = "auto",
) -> Samples:
    """Draw images, write them as a grid, and read the test set once.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train nice` has written, or the folder of a run, whose
            last weights are taken.
        num_samples: How many images to draw.
        temperature: What codes are multiplied by.
        missing: The part of test images that is filled in, see `known_pixels`; None for no such picture.
        num_steps: Steps by which it is.
        step_size: The first of them, see `NICE.inpaint`.
        data: Data set, by name or path, to read the test images from; the one trained on if not given.
        seed: Which samples, and which noise.
        output_dir: Folder for the pictures; that of the checkpoint if not given.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes a GPU if there is one.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or holds no density.
        DataError: The data set is missing or corrupt.
        ValueError: The images of `data` are not those that the model was made for, or `device` is not there.
    """
    if missing is not None:
        check_choice("missing", missing, get_args(Missing))
    place = find_device(device)
    weights = find_weights(Path(checkpoint))
    density = load_density(weights)
    folder = weights.parent if output_dir is None else Path(output_dir).expanduser()
    name, images = _test_images(density, data)
    folder.mkdir(parents=True, exist_ok=True)
    density.to(place)
    generator = torch.Generator(place).manual_seed(seed)
    drawn = density.sample(num_samples, temperature=temperature, generator=generator).cpu()
    files = [folder / "samples.png"]
    save_grid(drawn, files[0])
    if missing is not None:
        files.append(folder / f"inpainting_{missing}.png")
        chosen = images[:: max(1, len(images) // _NUM_INPAINTED)][:_NUM_INPAINTED]
        mask = known_pixels(missing, density.header.image_shape, seed=seed)
        climb = {"num_steps": num_steps, "step_size": step_size, "noise": _NOISE}
        filled = density.inpaint(chosen.to(place), mask, generator=generator, **climb).cpu()
        grey = torch.full_like(chosen, 128)
        save_grid(torch.cat((chosen, torch.where(mask, chosen, grey), filled)), files[1], num_columns=len(chosen))
    return Samples(
        checkpoint=weights,
        data=name,
        num_test_images=len(images),
        test_bits_per_dim=mean_bits_per_dim(density, images, place, seed),
        images=drawn,
        files=tuple(files),
    )


def known_pixels(missing: Missing, image_shape: tuple[int, int, int], *, seed: int = 0) -> Tensor:
    """Which pixels are known, (1, H, W), bool: all but a half, or `random` for every pixel with probability 1/2."""
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


def _test_images(density: ImageDensity, data: str | Path | None) -> tuple[str, Tensor]:
    header = density.header
    dataset = load_dataset(header.data if data is None else data)
    if not isinstance(dataset.test, ImageSplit) or dataset.test.image_shape != header.image_shape:
        shape, expected = ("x".join(map(str, each)) for each in (dataset.test.image_shape, header.image_shape))
        raise ValueError(
            f"`data` (='{dataset.name}') has images of {shape}, but the checkpoint was made for {expected} "
            f"({header.data}); pass data like those that it was trained on."
        )
    return dataset.name, dataset.test.images
