"""`revnet bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path


def bench(
    *, quick: bool = False, device: str = "cpu", output_dir: str | None = None, num_rounds: int | None = None
) -> None:
    """Measure memory, time and correctness beside plain autograd, checkpointing and other reversible libraries.

    Takes about twenty minutes on two cores; leave the machine alone meanwhile. Libraries that are not installed are
    listed as such; `pip install --no-deps -r benchmarks/peers.txt` installs them.

    Examples:
        revnet bench --quick
        revnet bench
        revnet bench --device cuda --output-dir results

    Args:
        quick: Measure a few shallow stacks only, for a look in about a minute.
        device: Where to measure memory and time: cpu, cuda, cuda:1.
        output_dir: Folder for the page, its CSV and its pictures; `benchmarks/results` if there is one, else this one.
        num_rounds: Timed steps of each contender; 15 if not given, 3 with `--quick`.
    """
    if num_rounds is not None and num_rounds < 1:
        raise ValueError(f"`--num-rounds` (={num_rounds}) must be a positive integer.")

    import torch

    from revnet.bench import QUICK, Settings, run_benchmark

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`--device` (={device}) is no device; use cpu or cuda.") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"`--device` (={device}) must be cpu or cuda.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"`--device` (={device}) is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    settings = dataclasses.replace(QUICK if quick else Settings(), device=place)
    if num_rounds is not None:
        settings = dataclasses.replace(settings, num_rounds=num_rounds)
    results = Path("benchmarks/results")
    folder = Path(output_dir) if output_dir is not None else results if results.is_dir() else Path()
    command = ["revnet bench", "--quick" * quick, f"--device {device}" * (device != "cpu")]
    command += [f"--num-rounds {num_rounds}"] if num_rounds is not None else []
    page = run_benchmark(settings, folder, " ".join(filter(None, command)))
    print(f"wrote {page}, its CSV and its pictures")
