"""Time of a step by what `torch.compile` compiles: nothing, the residual functions, or the whole model.

    python benchmarks/compilation.py

Each round runs one step of every variant, in a random order, on batches of one size or of changing sizes. Times are
processor times relative to the uncompiled stored twin of the same round, on one thread. Writes a page and its CSV to
benchmarks/results/.
"""

import argparse
import datetime
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _memory_page import Row, table, write_csv
from torch import Tensor, nn

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.bench.cases import CASES, Case
from revnet.nn import AbstractPolicy

RESULTS = Path(__file__).parent / "results"
SHARES = (1.0, 0.75, 0.5)
"""Sizes of the batches that change, as shares of the workload's batch size or number of tokens."""


class Model(nn.Module):
    """A reversible sequence between two layers that are not reversible."""

    def __init__(self, case: Case, depth: int, policy: AbstractPolicy):
        super().__init__()
        blocks = [
            ReversibleBlock(f, g, split_dim=case.split_dim) for f, g in case.functions(depth, torch.device("cpu"))
        ]
        self.blocks = ReversibleSequential(*blocks, policy=policy)

    def forward(self, x: Tensor) -> Tensor:
        """Return a loss."""
        return self.blocks(x.sin()).square().mean()


@dataclass(frozen=True)
class Variant:
    """A way to run the model."""

    name: str
    policy: AbstractPolicy
    compiles_functions: bool = False
    compiles_model: bool = False


VARIANTS = (
    Variant("stored", Store()),
    Variant("stored, whole model compiled", Store(), compiles_model=True),
    Variant("reversed", Reverse()),
    Variant("reversed, functions compiled", Reverse(), compiles_functions=True),
    Variant("reversed, whole model compiled", Reverse(), compiles_model=True),
    Variant("reversed, both compiled", Reverse(), compiles_functions=True, compiles_model=True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    parser.add_argument("--num-rounds", type=int, default=12, help="rounds after the ones that compile")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if min(given.depth, given.num_rounds) < 1:
        parser.error("all numbers must be at least 1")
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    torch.set_num_threads(1)
    rows = [
        row
        for case in CASES
        for shares in (SHARES[:1], SHARES)
        for row in measure(case, shares, given.depth, given.num_rounds, given.backend)
    ]
    stem = f"compilation_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# What to compile",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/compilation.py", *arguments])),
        "",
        *describe(rows, given.depth, given.num_rounds, given.backend),
    ]
    write_csv(rows, given.out_dir / f"{stem}.csv")
    text = "\n".join(page).rstrip() + "\n"
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


def measure(case: Case, shares: Sequence[float], depth: int, num_rounds: int, backend: str) -> list[Row]:
    """Return one row for each variant on one workload, with batches of these sizes."""
    torch._dynamo.reset()
    steps, compile_seconds = {}, {}
    for variant in VARIANTS:
        steps[variant] = make_step(variant, case, depth, backend)
        start = time.perf_counter()
        # Twice, because a second size may be compiled for all sizes.
        for share in (*shares, *shares):
            steps[variant](make_input(case, share))
        compile_seconds[variant] = time.perf_counter() - start
    seconds: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    draw = random.Random(0)
    for number in range(num_rounds):
        x = make_input(case, shares[number % len(shares)])
        for variant in draw.sample(VARIANTS, len(VARIANTS)):
            start = time.process_time()
            steps[variant](x)
            seconds[variant].append(time.process_time() - start)
    plain = seconds[VARIANTS[0]]
    return [
        {
            "workload": case.name,
            "shapes": "one" if len(shares) == 1 else "changing",
            "variant": variant.name,
            "ratio": statistics.median(own / base for own, base in zip(seconds[variant], plain, strict=True)),
            "first_steps_s": compile_seconds[variant],
        }
        for variant in VARIANTS
    ]


def make_step(variant: Variant, case: Case, depth: int, backend: str) -> Callable[[Tensor], None]:
    """Return a function that runs one step."""
    model = Model(case, depth, variant.policy)
    if variant.compiles_functions:
        for block in model.blocks:
            block.compile(backend=backend)
    if variant.compiles_model:
        model.compile(backend=backend)

    def step(x: Tensor) -> None:
        model(x).backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def make_input(case: Case, share: float) -> Tensor:
    """Return a batch whose size, or whose number of tokens, is a share of the workload's."""
    dim = 1 if case.name == "transformer" else 0
    x1, x2 = (x.narrow(dim, 0, round(share * x.shape[dim])) for x in case.streams(0))
    return torch.cat((x1, x2), case.split_dim)


def describe(rows: Sequence[Row], depth: int, num_rounds: int, backend: str) -> list[str]:
    """Return the lines of the page."""
    return [
        f"A step of {depth} blocks of the workloads of `revnet bench`, with the backend {backend}: medians over",
        f"{num_rounds} rounds of the processor time relative to the uncompiled stored network in the same round. The",
        "changing shapes are batches of 32, 24 and 16 images, or sequences of 256, 192 and 128 tokens, one after the",
        "other. The first steps include compilation.",
        "",
        *table(
            ["workload", "shapes", "variant", "step time", "first steps, s"],
            [
                [row["workload"], row["shapes"], row["variant"], f"{row['ratio']:.2f}", f"{row['first_steps_s']:.1f}"]
                for row in rows
            ],
        ),
    ]


if __name__ == "__main__":
    main()
