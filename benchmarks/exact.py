"""Exact reversal: bitwise equality, bytes and seconds.

    python benchmarks/exact.py --exactness --depth 1024 --num-steps 200
    python benchmarks/exact.py --depths 10,100,1000,10000
    python benchmarks/exact.py --cost
    python benchmarks/exact.py --conversion --batch-size 64

Small networks learn scikit-learn's digits. `--exactness` trains a reversed network and its stored twin and compares
every bit of the rebuilt inputs, the gradients and the final weights. `--depths` counts the memory of a step at
increasing depth. `--cost` times steps of exact and floating-point reversal, interleaved in one process, and the drift
check of every run. `--conversion` times converted networks next to ordinary ones. Each option writes a table and its
CSV to benchmarks/results/.
"""

import argparse
import copy
import datetime
import gc
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from _exact_conversion import conversion_section
from _memory_page import Row, Section, table, write_csv
from torch import Tensor, nn

from revnet import (
    FixedPoint,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    create_model,
    set_coupling,
    set_policy,
)
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.bench.cases import CASES
from revnet.coupling import AbstractCoupling
from revnet.engine._agreement import AgreementWatch
from revnet.memory import measure

RESULTS = Path(__file__).parent / "results"
WIDTH = 8  # both streams together


class Attention(nn.Module):
    """Layer norm, self-attention with two heads, and dropout."""

    def __init__(self, num_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.qkv = nn.Linear(num_features, 3 * num_features)
        self.project = nn.Linear(num_features, num_features)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual of `x`."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.project(y.transpose(1, 2).reshape(B, T, D)))


def mlp(num_features: int) -> nn.Sequential:
    """Return layer norm, a perceptron and dropout."""
    layers = [nn.LayerNorm(num_features), nn.Linear(num_features, 2 * num_features), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(2 * num_features, num_features), nn.Dropout(0.1))


def conv(num_channels: int) -> nn.Sequential:
    """Return batch norm, ReLU, a 3x3 convolution and dropout."""
    convolution = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(num_channels), nn.ReLU(), convolution, nn.Dropout(0.1))


class Network(nn.Module):
    """A stem, blocks and a head for images, (B, 1, 8, 8). A transformer reads the rows as tokens."""

    def __init__(self, kind: str, depth: int, coupling: AbstractCoupling):
        super().__init__()
        self.is_conv = kind == "conv"
        half = WIDTH // 2
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1) if self.is_conv else nn.Linear(8, WIDTH)
        functions = (conv, conv) if self.is_conv else (Attention, mlp)
        split_dim = 1 if self.is_conv else -1
        blocks = [
            ReversibleBlock(functions[0](half), functions[1](half), split_dim=split_dim, coupling=coupling)
            for _ in range(depth)
        ]
        with torch.no_grad():  # makes the sum of all residuals about as large as one
            for block in blocks:
                for function in (block.f, block.g):
                    *_, last = [layer for layer in function.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
                    last.weight.mul_(depth**-0.5)
        self.blocks = ReversibleSequential(*blocks)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.blocks(self.stem(x if self.is_conv else x.squeeze(1)))
        return self.head(x.float().mean((2, 3) if self.is_conv else 1))


def digits(batch_size: int) -> tuple[Tensor, Tensor]:
    """Return images of digits, from 0 to 1, and their labels."""
    with np.load(str(files("revnet.data.sources") / "digits.npz")) as data:
        images, labels = (torch.from_numpy(data[name][:batch_size]) for name in ("levels", "labels"))
    return images[:, None] / 16, labels.long()


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Return the cross-entropy."""
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
        return F.cross_entropy(model(images).float(), labels)


# Bits -----------------------------------------------------------------------------------------------------------------


def exactness(kind: str, precision: str, depth: int, num_steps: int, batch_size: int) -> Row:
    """Train a reversed network and its stored twin, and compare every bit."""
    torch.manual_seed(0)
    network = Network(kind, depth, FixedPoint())
    twin = copy.deepcopy(network)
    set_policy(twin, Store())
    images, labels = digits(num_steps * batch_size if num_steps * batch_size < 1797 else 1792)
    lr = min(
        0.01, 0.64 / depth
    )  # All blocks move the output in one direction, so the steps must shrink with their number.
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9) for model in (network, twin)]
    rebuilt = _inputs_of(network)
    losses: list[tuple[float, float]] = []
    equal_gradients, num_gradients = 0, 0
    for step in range(num_steps):
        first = step * batch_size % (len(images) - batch_size + 1)
        batch = images[first : first + batch_size], labels[first : first + batch_size]
        pair = []
        for model, optimizer in zip((network, twin), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = loss_of(model, *batch, precision)
            loss.backward()
            pair.append(float(loss.detach()))
        losses.append((pair[0], pair[1]))
        if step == 0:
            counts = rebuilt()
        if step in (0, num_steps - 1):
            both = list(zip(network.parameters(), twin.parameters(), strict=True))
            equal_gradients += sum(torch.equal(a.grad, b.grad) for a, b in both)
            num_gradients += len(both)
        for optimizer in optimizers:
            optimizer.step()
    weights = [*zip(network.state_dict().values(), twin.state_dict().values(), strict=True)]
    return {
        "kind": kind,
        "precision": precision,
        "blocks": depth,
        "steps": num_steps,
        "inputs_equal": counts[0],
        "inputs": counts[1],
        "gradients_equal": equal_gradients,
        "gradients": num_gradients,
        "losses_equal": sum(a == b for a, b in losses),
        "weights_equal": sum(torch.equal(a, b) for a, b in weights),
        "weights": len(weights),
        "first_loss": round(losses[0][0], 4),
        "last_loss": round(losses[-1][0], 4),
    }


def _inputs_of(network: Network) -> Callable[[], tuple[int, int]]:
    """Record the functions' inputs in one step. The result counts inputs that are equal in both runs, and all."""
    seen: dict[int, list[int]] = {}
    handles = []

    def watch(function: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(id(function), []).append(hash(args[0].detach().contiguous().numpy().tobytes()))

        handles.append(function.register_forward_pre_hook(before))

    for block in network.blocks:
        watch(block.f)
        watch(block.g)

    def count() -> tuple[int, int]:
        for handle in handles:
            handle.remove()
        return sum(len(hashes) == 2 and hashes[0] == hashes[1] for hashes in seen.values()), len(seen)

    return count


def exactness_section(arguments: argparse.Namespace) -> Section:
    """Measure every kind of network in every precision."""
    sizes = arguments.depth, arguments.num_steps, arguments.batch_size
    settings = list(itertools.product(arguments.kinds.split(","), arguments.precisions.split(",")))
    if arguments.num_workers == 1:
        rows = [exactness(*setting, *sizes) for setting in settings]
    else:
        with ProcessPoolExecutor(arguments.num_workers, multiprocessing.get_context("spawn")) as pool:
            rows = [future.result() for future in [pool.submit(exactness, *setting, *sizes) for setting in settings]]
    lines = [
        f"Networks of {arguments.depth:,} blocks, batch {arguments.batch_size}, `FixedPoint()`, with dropout of 0.1 "
        "(and batch norm in conv), trained",
        "by SGD like their stored twins, from the same seeds. Inputs: the inputs of the residual functions in the "
        "backward pass of",
        "the first step, compared with the forward pass. Gradients: all parameters, in the first and the last step. "
        "Weights:",
        "parameters and buffers after the last step.",
        "",
        *table(
            [
                "network",
                "precision",
                "steps",
                "inputs equal",
                "gradients equal",
                "losses equal",
                "weights equal",
                "loss",
            ],
            [
                [
                    str(row["kind"]),
                    str(row["precision"]),
                    str(row["steps"]),
                    *[f"{row[f'{name}_equal']:,} of {row[name]:,}" for name in ("inputs", "gradients")],
                    f"{row['losses_equal']} of {row['steps']}",
                    f"{row['weights_equal']:,} of {row['weights']:,}",
                    f"{row['first_loss']} -> {row['last_loss']}",
                ]
                for row in rows
            ],
        ),
    ]
    return Section(["## Every bit", "", *lines], rows)


# Bytes ----------------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def depth_row(depth: int, num_steps: int, batch_size: int) -> Row:
    """Train a convolutional network of `depth` blocks briefly, and count the memory of a step."""
    torch.manual_seed(0)
    network = Network("conv", depth, FixedPoint())
    images, labels = digits(batch_size)
    # In the first steps all blocks move the output in one direction, so the steps must shrink with their number.
    optimizer = torch.optim.SGD(network.parameters(), lr=min(0.01, 1 / depth))
    memory = measure(network, images, loss=lambda y: F.cross_entropy(y, labels))
    losses, seconds, growths = [], [], []
    for _ in range(num_steps):
        optimizer.zero_grad(set_to_none=False)
        gc.collect()
        before = resident_bytes()
        start = time.process_time()
        loss = loss_of(network, images, labels, "32-true")
        growths.append(resident_bytes() - before)
        loss.backward()
        seconds.append(time.process_time() - start)
        optimizer.step()
        losses.append(float(loss.detach()))
    return {
        "blocks": depth,
        "peak_bytes": memory.activation_bytes,
        "held_bytes": memory.held_bytes,
        "parameter_bytes": memory.parameter_bytes,
        "resident_bytes_of_forward": max(growths),
        "step_seconds": round(statistics.median(seconds), 4),
        "milliseconds_per_block": round(1e3 * statistics.median(seconds) / depth, 3),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def depths_section(arguments: argparse.Namespace) -> Section:
    """Measure increasing depths."""
    rows = []
    for depth in map(int, arguments.depths.split(",")):
        rows.append(depth_row(depth, arguments.num_steps, arguments.batch_size))
        print(rows[-1], flush=True)
    lines = [
        f"Convolutional networks, batch {arguments.batch_size}, `FixedPoint()`, {arguments.num_steps} steps of SGD on "
        "one batch. Peak and held: bytes of",
        "tensors without parameters, gradients and input. Bookkeeping: the largest growth of the process in one "
        "forward pass:",
        "for each call Python objects, autograd nodes, and 5 kB for the random state of dropout.",
        "",
        *table(
            ["blocks", "peak KiB", "held KiB", "bookkeeping MiB", "step s", "ms per block", "loss"],
            [
                [
                    f"{row['blocks']:,}",
                    f"{row['peak_bytes'] / 2**10:,.1f}",
                    f"{row['held_bytes'] / 2**10:,.1f}",
                    f"{row['resident_bytes_of_forward'] / 2**20:,.1f}",
                    f"{row['step_seconds']:.3f}",
                    f"{row['milliseconds_per_block']:.3f}",
                    f"{row['first_loss']} -> {row['last_loss']}",
                ]
                for row in rows
            ],
        ),
    ]
    return Section(["## Any depth", "", *lines], rows)


# Seconds --------------------------------------------------------------------------------------------------------------


def cost_section(arguments: argparse.Namespace) -> Section:
    """Time exact and floating-point reversal and the drift check, interleaved."""
    rows = []
    for name, model, x in _workloads():
        row = _cost(model, x, arguments.num_steps)
        rows.append({"workload": name, **row})
        print(rows[-1], flush=True)
    lines = [
        f"Medians of the ratios of {arguments.num_steps} rounds; each round runs one step of every variant. Ratios",
        "are to `Additive()`, reversed; seconds are processor time.",
        "Drift check: the share of a step that compares one sample of the rebuilt tensors.",
        "",
        *table(
            ["workload", "step s", "exact", "exact, float64 streams", "stored", "drift check"],
            [
                [
                    str(row["workload"]),
                    f"{row['step_seconds']:.3f}",
                    *[f"{row[way]:.3f}" for way in ("exact", "exact_wide", "stored")],
                    f"{100 * row['check_share']:.2f} %",
                ]
                for row in rows
            ],
        ),
    ]
    return Section(["## Cost", "", *lines], rows)


def _workloads() -> list[tuple[str, nn.Module, Tensor]]:
    workloads: list[tuple[str, nn.Module, Tensor]] = []
    for case in CASES:
        blocks = [ReversibleBlock(*case.make_block(), split_dim=case.split_dim) for _ in range(4)]
        workloads.append(
            (f"{case.name}, 4 blocks", ReversibleSequential(*blocks), torch.cat(case.streams(0), case.split_dim))
        )
    revnet = create_model("revnet38").to(memory_format=torch.channels_last)
    workloads.append(("revnet38, 25 images", revnet, torch.randn(25, 3, 32, 32)))
    return workloads


def _cost(model: nn.Module, x: Tensor, num_rounds: int) -> Row:
    ways: dict[str, nn.Module] = {"float": model}
    for name, coupling in (("exact", FixedPoint()), ("exact_wide", FixedPoint(is_wide=True))):
        ways[name] = copy.deepcopy(model)
        set_coupling(ways[name], coupling)
    ways["stored"] = copy.deepcopy(model)
    set_policy(ways["stored"], Store())
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    seconds = []
    for number in range(num_rounds + 1):
        times = {}
        names = list(ways)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            times[name] = _step_seconds(ways[name], x)
        if number:  # the first round warms up
            seconds.append(times["float"])
            for name in ways:
                ratios[name].append(times[name] / times["float"])
    row: Row = {"step_seconds": round(statistics.median(seconds), 4)}
    row |= {name: round(statistics.median(values), 4) for name, values in ratios.items()}
    return row | {"check_share": round(statistics.median(_check_share(model, x) for _ in range(num_rounds)), 6)}


def _step_seconds(model: nn.Module, x: Tensor) -> float:
    model.zero_grad(set_to_none=False)
    gc.collect()
    start = time.process_time()
    model(x).square().mean().backward()
    return time.process_time() - start


def _check_share(model: nn.Module, x: Tensor) -> float:
    """Return the share of a step that is spent in the drift check."""
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for name in ("__init__", "on_forward", "on_hold", "before_rebuild", "before_replay", "after_undo"):
            stack.enter_context(mock.patch.object(AgreementWatch, name, timed(getattr(AgreementWatch, name))))
        start = time.perf_counter()
        model(x).square().mean().backward()
        return spent / (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exactness", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--conversion", action="store_true")
    parser.add_argument("--depths", help="numbers of blocks, such as 10,100,1000,10000")
    parser.add_argument("--depth", type=int, default=1024, help="for --exactness")
    parser.add_argument("--kinds", default="conv,transformer", help="for --exactness")
    parser.add_argument("--precisions", default="32-true,bf16-mixed", help="for --exactness")
    parser.add_argument("--num-workers", type=int, default=1, help="for --exactness: number of processes")
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if not (given.exactness or given.cost or given.conversion or given.depths):
        parser.error("nothing to measure; pass --exactness, --depths or --cost, or --conversion")
    options = ["--exactness"] * given.exactness + ["--cost"] * given.cost + ["--conversion"] * given.conversion
    options += [f"--depths {given.depths}"] if given.depths else []
    options += [f"--depth {given.depth} --kinds {given.kinds}"] if given.exactness else []
    options += [f"--precisions {given.precisions}"] if given.exactness and "," not in given.precisions else []
    options += [f"--num-workers {given.num_workers}"] if given.num_workers > 1 else []
    options += [f"--num-steps {given.num_steps}", f"--batch-size {given.batch_size}"]
    command = f"python benchmarks/exact.py {' '.join(options)}"
    for is_selected, name, section_of in (
        (given.exactness, "exact", exactness_section),
        (given.depths, "exact-depths", depths_section),
        (given.cost, "exact-cost", cost_section),
        (given.conversion, "exact-conversion", lambda given: conversion_section(given.num_steps, given.batch_size)),
    ):
        if is_selected:
            section = section_of(given)
            stem = f"{name}_{hardware_name()}_{datetime.date.today()}"
            lines = ["# Exact reversal", "", *describe_machine(command), "", *section.lines]
            (given.out_dir / f"{stem}.md").write_text("\n".join(lines).rstrip() + "\n")
            write_csv(section.rows, given.out_dir / f"{stem}.csv")
            print(*lines, sep="\n")


if __name__ == "__main__":
    main()
