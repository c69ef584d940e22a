"""`revnet bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from revnet.bench import Settings


def bench(
    *,
    quick: bool = False,
    host: bool = False,
    device: str = "cpu",
    output_dir: str | None = None,
    num_rounds: int | None = None,
) -> None:
    """Measure memory, time and correctness beside plain autograd, checkpointing and other reversible libraries.

    Takes about twenty minutes on two cores; leave the machine alone meanwhile. Libraries that are not installed are
    listed as such; `pip install --no-deps -r benchmarks/peers.txt` installs them.

    With `--host`, measure the processor time of a step on tiny tensors instead: what Python, the engine and PyTorch's
    dispatcher cost, which limits small networks on a GPU. Takes a minute or two.

    Examples:
        revnet bench --quick
        revnet bench
        revnet bench --host
        revnet bench --device cuda --output-dir results

    Args:
        quick: Measure a few shallow stacks only, for a look in about a minute.
        host: Measure processor time on tiny tensors, on one thread of the CPU.
        device: Where to measure memory and time: cpu, cuda, cuda:1.
        output_dir: Folder for the page, its CSV and its pictures; `benchmarks/results` if there is one, else this one.
        num_rounds: Rounds in which each method is timed; 15 if not given, 3 with `--quick`; 101 or 11 with `--host`.
    """
    if num_rounds is not None and num_rounds < 1:
        raise ValueError(f"`--num-rounds` (={num_rounds}) must be a positive integer.")
    if host and device != "cpu":
        raise ValueError(
            f"`--device` (={device}) must be cpu with `--host`, which measures processor time; leave it out."
        )
    results = Path("benchmarks/results")
    folder = Path(output_dir) if output_dir is not None else results if results.is_dir() else Path()
    command = ["revnet bench", "--host" * host, "--quick" * quick, f"--device {device}" * (device != "cpu")]
    command += [f"--num-rounds {num_rounds}"] if num_rounds is not None else []
    line = " ".join(filter(None, command))
    if host:
        _bench_host(num_rounds, quick, folder, line)
    else:
        _bench_engines(_settings(quick, device, num_rounds), folder, line)


def _bench_host(num_rounds: int | None, quick: bool, folder: Path, command: str) -> None:
    from revnet.bench import run_host_benchmark
    from revnet.bench.host import NUM_QUICK_ROUNDS, NUM_ROUNDS

    page = run_host_benchmark(num_rounds or (NUM_QUICK_ROUNDS if quick else NUM_ROUNDS), folder, command)
    print(page.read_text())
    print(f"wrote {page} and its CSV")


def _bench_engines(settings: Settings, folder: Path, command: str) -> None:
    from revnet.bench import run_benchmark

    page = run_benchmark(settings, folder, command)
    print(f"wrote {page}, its CSV and its pictures")


def _settings(quick: bool, device: str, num_rounds: int | None) -> Settings:
    import torch

    from revnet.bench import QUICK, Settings

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`--device` (={device}) is no device; use cpu or cuda.") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"`--device` (={device}) must be cpu or cuda.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"`--device` (={device}) is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    settings = dataclasses.replace(QUICK if quick else Settings(), device=place)
    return settings if num_rounds is None else dataclasses.replace(settings, num_rounds=num_rounds)
