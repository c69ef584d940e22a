"""Train the 3-D U-Net on patches and run it on whole volumes by sliding windows.

    python benchmarks/patches.py

Writes patches_<hardware>_<date>.md and its CSV to benchmarks/results/.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _memory_page import Row, Section, mib, table, write_csv
from _volumes_balls import balls, dice
from torch import Tensor

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.functional import sliding_window_inference
from revnet.functional._sliding_window import _windows
from revnet.memory import max_patch_size, predict
from revnet.models import UNet3d

RESULTS = Path(__file__).parent / "results"
SMALL = {"in_channels": 1, "num_classes": 1, "widths": (8, 16, 32)}
BATCH_SIZE = 4
NUM_TEST_VOLUMES = 4
WAYS = (
    (0.0, "constant"),
    (0.25, "constant"),
    (0.25, "gaussian"),
    (0.5, "constant"),
    (0.5, "gaussian"),
    (0.75, "gaussian"),
)
"""Overlap and weights."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, run and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="side of the volumes")
    parser.add_argument(
        "--budget", default="16MiB", help="memory of a training step, which sets the side of the patches"
    )
    parser.add_argument("--num-updates", type=int, default=200)
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.size % 4 or min(given.size, given.num_updates) < 1:
        parser.error("--size must be a multiple of 4, and all numbers at least 1")
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    section = measure(given.size, given.budget, given.num_updates)
    stem = f"patches_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# Patches: the 3-D U-Net on volumes that are too large to train on",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/patches.py", *arguments])),
        "",
        *section.lines,
    ]
    write_csv(section.rows, given.out_dir / f"{stem}.csv")
    text = "\n".join(page).rstrip() + "\n"
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


def measure(size: int, budget: str, num_updates: int) -> Section:
    """Find the patch, train on patches, and compare ways to cover whole volumes."""
    torch.manual_seed(0)
    model = UNet3d(**SMALL)
    start = torch.empty(BATCH_SIZE, 1, 8, 8, 8, device="meta")
    side = min(max_patch_size(model, start, budget=budget, optimizer=torch.optim.Adam), size)
    if not side:
        raise SystemExit(f"no patch fits into {budget}; pass a larger --budget")
    peaks = [peak_bytes(model, side) for side in (side, side + model.size_multiple, size)]
    train(model, side, size, num_updates)
    volumes, masks = balls(NUM_TEST_VOLUMES, size, torch.Generator().manual_seed(1))
    rows = []
    for overlap, weights in WAYS:
        patches = sum(1 for _ in _windows((size,) * 3, (side,) * 3, overlap))
        logits = by_volume(
            lambda x, o=overlap, w=weights: sliding_window_inference(  # type: ignore[misc]
                model, x, side, overlap=o, weights=w, batch_size=BATCH_SIZE
            ),
            volumes,
        )
        rows.append({"overlap": overlap, "weights": weights, "patches": patches, "dice": dice(logits > 0, masks)})
    with torch.no_grad():
        whole = dice(by_volume(model, volumes) > 0, masks)
    rows.append({"overlap": "", "weights": "whole volume", "patches": 1, "dice": whole})
    return Section(describe(rows, side, size, budget, num_updates, peaks), rows)


def train(model: UNet3d, side: int, size: int, num_updates: int) -> None:
    """Train on one random patch of each of four new volumes in every update."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(num_updates):
        volumes, masks = balls(BATCH_SIZE, size, generator)
        corners = torch.randint(0, size - side + 1, (BATCH_SIZE, 3), generator=generator).tolist()
        patches, patch_masks = (crop(tensors, corners, side) for tensors in (volumes, masks.float()))
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(patches), patch_masks).backward()
        optimizer.step()


def crop(tensors: Tensor, corners: Sequence[Sequence[int]], side: int) -> Tensor:
    """Return one cube of each volume."""
    cubes = []
    for tensor, corner in zip(tensors, corners, strict=True):
        cubes.append(tensor[(slice(None), *[slice(start, start + side) for start in corner])])
    return torch.stack(cubes)


def by_volume(function: Callable[[Tensor], Tensor], volumes: Tensor) -> Tensor:
    """Return the outputs of one volume after the other."""
    return torch.cat([function(volume[None]) for volume in volumes])


def peak_bytes(model: UNet3d, side: int) -> int:
    """Return the peak of a training step on a batch of cubes."""
    x = torch.empty(BATCH_SIZE, 1, side, side, side, device="meta")
    return predict(model, x, optimizer=torch.optim.Adam).peak_bytes


def describe(rows: list[Row], side: int, size: int, budget: str, num_updates: int, peaks: Sequence[int]) -> list[str]:
    """Return the lines of the page."""
    cells = [[str(row["weights"]), str(row["overlap"]), f"{row['patches']:,}", f"{row['dice']:.4f}"] for row in rows]
    next_side = side + 4
    return [
        f"`UNet3d` with widths 8, 16, 32, and volumes of {size}x{size}x{size}: noise with one ball, brighter by one",
        f"standard deviation of the noise. `max_patch_size` finds patches of {side}x{side}x{side} for a training step",
        f"on {BATCH_SIZE} patches within {budget}.",
        "",
        *table(
            ("cubes in a step", "predicted peak, MiB"),
            [[f"{cube}x{cube}x{cube}", mib(peak)] for cube, peak in zip((side, next_side, size), peaks, strict=True)],
        ),
        f"Trained for {num_updates} updates with Adam, learning rate 0.01, each on a random patch of {BATCH_SIZE} new",
        f"volumes. Dice on {NUM_TEST_VOLUMES} other volumes, whole, by `sliding_window_inference`:",
        "",
        *table(("weights", "overlap", "patches of a volume", "Dice"), cells),
    ]


if __name__ == "__main__":
    main()
