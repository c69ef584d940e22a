"""`revnet bench`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from revnet._paths import expand_user
from revnet.cli._errors import UsageError

if TYPE_CHECKING:
    from revnet.bench import Settings


def bench(
    *,
    quick: bool = False,
    host: bool = False,
    device: str = "cpu",
    out_dir: str | None = None,
    num_rounds: int | None = None,
) -> None:
    """Compare memory, time and correctness with other ways to train.

    The others are plain autograd, checkpointing and other reversible libraries. A run takes about twenty minutes on two
    cores; run nothing else on the machine. Libraries that are not installed are listed as such; install them by
    `pip install --no-deps -r benchmarks/peers.txt`.

    With `--host`, measure instead the processor time of a step on tiny tensors: the cost of Python, the engine and
    PyTorch's dispatcher, which limits small networks on a GPU. This takes a minute or two.

    Examples:
        revnet bench --quick
        revnet bench
        revnet bench --host
        revnet bench --device cuda --out-dir results

    Args:
        quick: Measure only a few shallow stacks, in about a minute.
        host: Measure processor time on tiny tensors, on one CPU thread.
        device: Device to measure on: cpu, cuda, cuda:1.
        out_dir: Folder for the page, its CSV files and its pictures; by default `benchmarks/results` if it exists,
            otherwise the current folder.
        num_rounds: Number of timed rounds per method. By default 15, or 3 with `--quick`; with `--host` 101, or 11 with
            `--quick`.
    """
    if num_rounds is not None and num_rounds < 1:
        raise UsageError(f"`--num-rounds` (={num_rounds}) must be a positive integer.")
    if host and device != "cpu":
        raise UsageError(
            f"`--device` (={device}) must be cpu with `--host`, which measures processor time; leave it out."
        )
    results = Path("benchmarks/results")
    folder = expand_user(out_dir) if out_dir is not None else results if results.is_dir() else Path()
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


def _bench_engines(settings: "Settings", folder: Path, command: str) -> None:
    from revnet.bench import run_benchmark

    page = run_benchmark(settings, folder, command)
    print(f"wrote {page}, its CSV and its pictures")


def _settings(quick: bool, device: str, num_rounds: int | None) -> "Settings":
    import torch

    from revnet.bench import Settings
    from revnet.bench.run import QUICK

    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"`--device` (={device}) must be a device, such as cpu or cuda.") from error
    if torch_device.type not in ("cpu", "cuda"):
        raise UsageError(f"`--device` (={device}) must be cpu or cuda.")
    num_gpus = torch.cuda.device_count()
    if torch_device.type == "cuda" and (torch_device.index or 0) >= num_gpus:
        raise UsageError(f"`--device` (={device}) is not available; PyTorch sees {num_gpus} CUDA devices.")
    settings = dataclasses.replace(QUICK if quick else Settings(), device=torch_device)
    return settings if num_rounds is None else dataclasses.replace(settings, num_rounds=num_rounds)
