"""Peak activation memory and step time against depth: reversed, checkpointed, stored.

    python benchmarks/memory_by_depth.py [--quick]

A stack of reversible blocks, F = G = BN-ReLU-conv3x3-BN-ReLU-conv3x3 on streams of 32 channels, batch 16, 32x32 images,
float32. Bytes are counted exactly (`revnet.memory.measure`); times are medians of training steps, the ways of running
interleaved in one process. Writes a table, its CSV and a picture into benchmarks/results/.
"""

import argparse
import csv
import datetime
import os
import statistics
import time
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from machine import RESULTS, describe_machine
from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.memory import measure
from revnet.models.resnet import BasicResidual

mpl.use("Agg")
import matplotlib.pyplot as plt

NUM_CHANNELS, BATCH_SIZE, IMAGE_SIZE = 32, 16, 32
WAYS = {
    "stored": "stored (plain autograd)",
    "checkpointed": "checkpointed per block",
    "reversed": "reversed (revnet)",
}


class CheckpointedBlocks(nn.Module):
    """The blocks of a stored sequence, each under PyTorch's non-reentrant checkpoint."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList([ReversibleSequential(block, policy=Store()) for block in blocks])

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Run the blocks."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def make_ways(depth: int) -> dict[str, nn.Module]:
    """The same blocks, run in each way."""
    blocks = [ReversibleBlock(*[BasicResidual(NUM_CHANNELS, NUM_CHANNELS) for _ in range(2)]) for _ in range(depth)]
    return {
        "stored": ReversibleSequential(*blocks, policy=Store()),
        "checkpointed": CheckpointedBlocks(blocks),
        "reversed": ReversibleSequential(*blocks, policy=Reverse()),
    }


def step_seconds(model: nn.Module, x: tuple[Tensor, Tensor]) -> float:
    """Time one forward and backward pass."""
    start = time.perf_counter()
    sum(y.sum() for y in model(x)).backward()
    return time.perf_counter() - start


def measure_depth(depth: int, num_steps: int) -> list[dict[str, object]]:
    """One row for each way of running."""
    ways = make_ways(depth)
    x = tuple(torch.randn(BATCH_SIZE, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE) for _ in range(2))
    memory = {name: measure(model, x) for name, model in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_steps + 1):
        for name, model in ways.items():
            times[name].append(step_seconds(model, x))
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first step warms up
    return [
        {
            "depth": depth,
            "way": name,
            "peak_bytes": memory[name].peak_bytes,
            "held_bytes": memory[name].held_bytes,
            "step_seconds": round(seconds[name], 4),
            "step_ratio": round(seconds[name] / seconds["stored"], 3),
        }
        for name in ways
    ]


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Draw peak memory against depth."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colors = {"stored": "#999999", "checkpointed": "#e08214", "reversed": "#2166ac"}
    for way, label in WAYS.items():
        points = [(row["depth"], row["peak_bytes"] / 2**20) for row in rows if row["way"] == way]
        axes.plot(*zip(*points, strict=True), marker="o", color=colors[way], label=label)
        axes.annotate(f"{points[-1][1]:,.0f} MiB", points[-1], (6, 0), textcoords="offset points", va="center")
    depths = sorted({row["depth"] for row in rows})
    axes.set_xlabel("reversible blocks")
    axes.set_ylabel("peak activation memory (MiB)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set_xlim(right=depths[-1] * 1.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def report(rows: list[dict[str, object]], command: str) -> str:
    """The Markdown page: circumstances first, then the table."""
    lines = [
        "# Memory and time by depth",
        "",
        *describe_machine(command),
        "- Workload: see the head of the script. Bytes are above parameters, gradients, buffers and the input, counted",
        "  exactly. Times are medians, interleaved in one process; read them as ratios.",
        "",
        "| blocks | way | peak MiB | held MiB | step s | step / stored |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['depth']} | {row['way']} | {row['peak_bytes'] / 2**20:.1f} | {row['held_bytes'] / 2**20:.1f} "
        f"| {row['step_seconds']:.3f} | {row['step_ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small depths, for a look")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for depth in (2, 4) if arguments.quick else (4, 8, 16, 32, 64):
        rows += measure_depth(depth, num_steps=3)
        print(*rows[-3:], sep="\n")
    name = f"memory-by-depth_cpu{os.cpu_count()}_{datetime.date.today()}"
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    command = "python benchmarks/memory_by_depth.py" + " --quick" * arguments.quick
    (RESULTS / f"{name}.md").write_text(report(rows, command))
    draw(rows, RESULTS / f"{name}.png")
    print(f"wrote {RESULTS / name}.md, .csv and .png")


if __name__ == "__main__":
    main()
