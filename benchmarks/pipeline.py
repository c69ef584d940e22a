"""The reversible pipeline next to PyTorch's schedules and DDP: held bytes, bytes sent, gradients and seconds.

    python benchmarks/pipeline.py --num-processes 2,4 --num-microbatches 4,8,16

The processes run on this machine, with gloo. Bytes are counted, and depend on nothing but the network. With more
processes than cores, times are no measure of a pipeline on several machines. It writes a table and its CSV to
benchmarks/results/.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _memory_page import Row, Section, table, write_csv
from _pipeline_methods import IN_CHANNELS, NUM_CLASSES, AbstractMethod, DataParallel, Network, make_methods, seed_stage
from _processes import run_in_processes
from torch import Tensor

from revnet import Store
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.distributed import cut_into_stages
from revnet.memory.step._live import LiveBytes

RESULTS = Path(__file__).parent / "results"
COUNTS = {2: (5, 3), 4: (3, 2, 1, 2)}
"""Number of blocks in each stage, by the number of processes."""
NUM_CHANNELS, SIDE, MICROBATCH = 32, 16, 4
EXACT_CHANNELS, EXACT_SIDE, EXACT_MICROBATCH = 4, 6, 2
"""A smaller network for the gradients, in float64."""


def make_batch(num_samples: int, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return images and labels, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, IN_CHANNELS, side, side, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(NUM_CLASSES, (num_samples,), generator=generator)


# Bytes ----------------------------------------------------------------------------------------------------------------


def count_bytes(method: AbstractMethod, x: Tensor, target: Tensor) -> tuple[int, int]:
    """Return the most bytes that are alive just before a pass, and at any time, without parameters and gradients."""
    for parameter in method.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in method.module.parameters()]
    live = LiveBytes([*method.module.parameters(), *method.module.buffers(), *grads, x, target])
    held: list[int] = []
    method.watch(lambda: held.append(live.live_bytes))
    with live:
        # PyTorch's stages allocate their receive buffers in the first step.
        method.step(x, target)
        held.clear()
        live.peak_bytes = live.live_bytes
        method.step(x, target)
    return max(held), live.peak_bytes


def bytes_of(method_index: int, counts: Sequence[int], num_microbatches: int) -> tuple[int, int, int]:
    """Return held, peak and sent bytes of one method in this process."""
    method = make_methods(counts, NUM_CHANNELS, num_microbatches, torch.float32, with_ddp=True)[method_index]
    x, target = make_batch(MICROBATCH * num_microbatches, SIDE, torch.float32)
    held, peak = count_bytes(method, x, target)
    return held, peak, method.sent_bytes()


# Gradients ------------------------------------------------------------------------------------------------------------


def reference_gradients(counts: Sequence[int], num_microbatches: int) -> Network:
    """Return a stored network after the backward passes of all microbatches in one process.

    The part of each stage draws from a random state of its own, as in separate processes.
    """
    network = Network(sum(counts), EXACT_CHANNELS, Store()).double()
    states = [torch.Generator().manual_seed(100 + index).get_state() for index in range(len(counts))]
    current = 0

    def switch_to(index: int) -> None:
        nonlocal current
        states[current] = torch.get_rng_state()
        torch.set_rng_state(states[index])
        current = index

    before = torch.get_rng_state()
    torch.set_rng_state(states[0])
    for index in range(1, len(counts)):
        first: Any = network.blocks[sum(counts[:index])]
        first.f.register_forward_pre_hook(lambda *_, index=index: switch_to(index))
    x, target = make_batch(EXACT_MICROBATCH * num_microbatches, EXACT_SIDE, torch.float64)
    for part, labels in zip(x.split(EXACT_MICROBATCH), target.split(EXACT_MICROBATCH), strict=True):
        switch_to(0)
        (F.cross_entropy(network(part), labels) / num_microbatches).backward()
    torch.set_rng_state(before)
    return network


def gradient_difference(method: AbstractMethod, counts: Sequence[int], num_microbatches: int) -> float:
    """Return the largest difference of a gradient, relative to the largest element of the gradient."""
    network = reference_gradients(counts, num_microbatches)
    stages = cut_into_stages(network.blocks, len(counts), num_blocks=list(counts), stem=network.stem, head=network.head)
    x, target = make_batch(EXACT_MICROBATCH * num_microbatches, EXACT_SIDE, torch.float64)
    # In the first step, PyTorch's stages run more often, to learn the shapes.
    method.step(x, target)
    method.module.zero_grad()
    seed_stage(dist.get_rank())
    method.step(x, target)
    pairs = zip(method.module.parameters(), stages[dist.get_rank()].parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)


# Seconds --------------------------------------------------------------------------------------------------------------


def time_steps(
    methods: Sequence[AbstractMethod], x: Tensor, target: Tensor, num_steps: int
) -> list[tuple[float, float]]:
    """Return the median seconds of a step of each method, and the processor time of this process.

    A step ends when all processes have finished. The methods take turns.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in methods]
    for step in range(num_steps + 1):
        for method, of_method in zip(methods, times, strict=True):
            method.module.zero_grad()
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            method.step(x, target)
            cpu_seconds = time.process_time() - cpu_start
            dist.barrier()
            # The first step allocates buffers and opens connections.
            if step > 0:
                of_method.append((time.perf_counter() - start, cpu_seconds))
    return [tuple(map(statistics.median, zip(*of_method, strict=True))) for of_method in times]  # type: ignore[misc]


# Processes ------------------------------------------------------------------------------------------------------------


def measure(counts: Sequence[int], num_microbatches: int, num_steps: int) -> list[Row]:
    """Return the measurements of this process: one row for each method."""
    names = [method.name for method in make_methods(counts, 4, num_microbatches, torch.float32, with_ddp=True)]
    exact = make_methods(counts, EXACT_CHANNELS, num_microbatches, torch.float64, with_ddp=False)
    differences = [gradient_difference(method, counts, num_microbatches) for method in exact]
    methods = make_methods(counts, NUM_CHANNELS, num_microbatches, torch.float32, with_ddp=True)
    x, target = make_batch(MICROBATCH * num_microbatches, SIDE, torch.float32)
    times = time_steps(methods, x, target, num_steps)
    rows = []
    for index, name in enumerate(names):
        held, peak, sent = bytes_of(index, counts, num_microbatches)
        rows.append(
            {
                "method": name,
                "num_processes": len(counts),
                "num_microbatches": num_microbatches,
                "stage": dist.get_rank(),
                "num_blocks": sum(counts) if isinstance(methods[index], DataParallel) else counts[dist.get_rank()],
                "held_bytes": held,
                "peak_bytes": peak,
                "sent_bytes": sent,
                "gradient_difference": differences[index] if index < len(differences) else "",
                "step_seconds": round(times[index][0], 4),
                "processor_seconds": round(times[index][1], 4),
            }
        )
    return rows


def measure_all(counts: Sequence[int], microbatches: Sequence[int], num_steps: int) -> list[Row]:
    """Return the measurements of this process for each number of microbatches."""
    return [row for number in microbatches for row in measure(counts, number, num_steps)]


def run_group(num_processes: int, microbatches: Sequence[int], num_steps: int) -> list[Row]:
    """Return the rows of all processes, ordered by method and number of microbatches."""
    arguments = (COUNTS[num_processes], microbatches, num_steps)
    results = run_in_processes(measure_all, *arguments, num_processes=num_processes)
    rows = [row for of_process in results for row in of_process]
    names = list(dict.fromkeys(row["method"] for row in rows))
    return sorted(rows, key=lambda row: (row["num_microbatches"], names.index(row["method"]), row["stage"]))


# The page -------------------------------------------------------------------------------------------------------------


def section_of(num_processes: int, rows: Sequence[Row]) -> list[str]:
    """Return the part of the page about one number of processes."""
    counts = COUNTS[num_processes]
    pair = MICROBATCH * 2 * NUM_CHANNELS * SIDE * SIDE * 4
    lines = [
        f"## {num_processes} processes",
        "",
        f"{sum(counts)} blocks in stages of {', '.join(map(str, counts))}, a stem and a head; microbatches of "
        f"{MICROBATCH} images. Columns with several numbers",
        f"have one for each stage, from the first to the last. Held and peak: pairs of streams of a microbatch, of "
        f"{pair:,} bytes.",
        "",
    ]
    for number in sorted({row["num_microbatches"] for row in rows}):
        lines += [f"### {number} microbatches", ""]
        cells = []
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name and row["num_microbatches"] == number]
            differences = [row["gradient_difference"] for row in own if row["gradient_difference"] != ""]
            cells.append(
                [
                    name,
                    " ".join(f"{row['held_bytes'] / pair:.1f}" for row in own),
                    " ".join(f"{row['peak_bytes'] / pair:.1f}" for row in own),
                    " ".join(f"{row['sent_bytes'] / 2**20:.1f}" for row in own),
                    f"{max(differences):.1e}" if differences else "",
                    f"{1e3 * max(row['step_seconds'] for row in own):,.0f}",
                    f"{1e3 * sum(row['processor_seconds'] for row in own):,.0f}",
                ]
            )
        columns = [
            "method",
            "held, pairs",
            "peak, pairs",
            "sent, MiB",
            "gradient difference",
            "step, ms",
            "processor, ms",
        ]
        lines += table(columns, cells)
    return lines


NOTES = [
    "- Held: the most bytes of tensors that are alive just before a pass, including what was just received.",
    "- Peak: the most bytes at any time in a step.",
    "- Held and peak leave out parameters, their gradients, buffers, the batch, and workspaces within an operation.",
    "- Sent: by each process in one step; for DDP the gradients, which its all-reduce sends about twice.",
    "- Gradient difference: from one process with the same microbatches and random numbers, relative to the largest",
    "  element of each gradient; in float64, with batch norm and dropout.",
    "- DDP gives each process the whole network and an equal part of the batch, so its bytes grow with the batch.",
    "- Step: the median, methods taking turns. Each process has one thread. Where processes share cores, with each",
    "  other or with other programs, compare processor time instead; it is the sum over processes.",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-processes", default="2,4", help=f"any of {', '.join(map(str, COUNTS))}")
    parser.add_argument("--num-microbatches", default="4,8,16")
    parser.add_argument("--num-steps", type=int, default=5, help="for the time")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    command = (
        f"python benchmarks/pipeline.py --num-processes {given.num_processes} "
        f"--num-microbatches {given.num_microbatches} --num-steps {given.num_steps}"
    )
    microbatches = [int(number) for number in given.num_microbatches.split(",")]
    rows: list[Row] = []
    lines = ["# An exact reversible pipeline", "", *describe_machine(command), "", *NOTES, ""]
    for num_processes in map(int, given.num_processes.split(",")):
        own = run_group(num_processes, microbatches, given.num_steps)
        lines += section_of(num_processes, own)
        rows += own
    section = Section(lines, rows)
    stem = f"pipeline_{hardware_name()}_{datetime.date.today()}"
    (given.out_dir / f"{stem}.md").write_text("\n".join(section.lines).rstrip() + "\n")
    write_csv(section.rows, given.out_dir / f"{stem}.csv")
    print(*section.lines, sep="\n")


if __name__ == "__main__":
    main()
