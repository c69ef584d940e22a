"""Time, arithmetic and memory of the three kinds of attention, by length and by depth.

    python benchmarks/attention.py
    python benchmarks/attention.py --cost --lengths 256,512

Three tables, each with a flag that selects it:

- `--cost`: one layer of each attention, forward and backward, with the exponent of the length in each cost.
- `--models`: a step of a reversible transformer and of its stored twin, by length and by depth. Bytes are predicted,
  which is exact; times are measured if the step fits.
- `--long`: training steps on 16,384 tokens, each model in a separate process, whose growth is measured.

Writes a page, a CSV for each table and figures to benchmarks/results/. Runs on the CPU, on Linux.
"""

import argparse
import datetime
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from _attention_plot import plot_cost, plot_models
from _memory_page import Row, Section, mib, table, write_csv
from _memory_real import give_back_freed, in_new_process, resident_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import revnet
from revnet import AbstractPolicy, Reverse, Store
from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet._memory_readings import process_peak_bytes
from revnet._provenance import describe_machine
from revnet.functional import rotary_table
from revnet.memory import predict
from revnet.memory.step._flops import FlopCounter
from revnet.models import ReversibleTransformer
from revnet.nn.attention import FullAttention, HierarchicalAttention, LSHAttention

RESULTS = Path(__file__).parent / "results"
TABLES = ("cost", "models", "long")
DIM, NUM_HEADS, VOCAB_SIZE = 256, 4, 256
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: FullAttention(DIM, NUM_HEADS, is_causal=True),
    "lsh": lambda: LSHAttention(DIM, NUM_HEADS, is_causal=True, bucket_size=64, num_hashes=4),
    "hierarchical": lambda: HierarchicalAttention(DIM, NUM_HEADS, is_causal=True, block_size=64),
}
ORDERS = {"full": "L^2", "lsh": "L log L", "hierarchical": "L"}
POLICIES: dict[str, AbstractPolicy] = {"reversible": Reverse(), "stored": Store()}
NUM_STEPS = 2
"""Number of steps on the long sequence."""
MOST_BYTES = 6 * 2**30
"""Largest memory of a step whose time is measured."""


def cost_section(lengths: Sequence[int], num_rounds: int, picture: Path) -> Section:
    """Measure one layer of each kind of attention."""
    layers = {name: make() for name, make in LAYERS.items()}
    rows = [counted_layer(name, length) for name in layers for length in lengths]
    for length in lengths:
        x, rotary = torch.randn(1, length, DIM, requires_grad=True), rotary_table(length, DIM // NUM_HEADS)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(num_rounds + 1):
            for name, layer in layers.items():
                seconds[name].append(timed(partial(layer_step, layer, x, rotary)))
        for row in rows:
            if row["length"] == length:
                row["seconds"] = round(statistics.median(seconds[row["attention"]][1:]), 4)  # the first round warms up
    plot_cost(rows, ORDERS, picture)
    columns = [f"{length:,}" for length in lengths]
    lines = [
        "## One layer, forward and backward",
        "",
        f"Causal, {DIM} features, {NUM_HEADS} heads, a batch of 1; LSH with buckets of 64 and 4 rounds, hierarchical",
        "with blocks of 64. The exponent is the slope of log cost against log length, over all lengths (and between",
        "the last two): 1 is linear, 2 quadratic, and 1.1 is L log L at these lengths. Arithmetic counts matrix",
        "products, two operations for each multiply-add; for full attention, PyTorch's formula counts the whole",
        "square. LSH attention also sorts and compares, which is included in the time but not in the arithmetic.",
        "",
        f"![{picture.name}]({picture.name})",
        "",
    ]
    for key, title, show in (
        ("seconds", f"time, s, median of {num_rounds} after one to warm up", lambda value: f"{value:.3f}"),
        ("flops", "arithmetic, GFLOP", lambda value: f"{value / 1e9:,.1f}"),
        ("activation_bytes", "memory, peak MiB above parameters and input", mib),
    ):
        cells = []
        for name in LAYERS:
            values = [row[key] for row in rows if row["attention"] == name]
            slope = f"{exponent(lengths, values):.2f} ({exponent(lengths[-2:], values[-2:]):.2f})"
            cells.append([f"{name}, {ORDERS[name]}", *map(show, values), slope])
        lines += table((title, *columns, "exponent"), cells)
    return Section(lines, rows)


def layer_step(layer: nn.Module, x: Tensor, rotary: Tensor) -> None:
    """Run forward and backward."""
    layer(x, rotary=rotary).sum().backward()


def counted_layer(name: str, length: int) -> Row:
    """Return the arithmetic and bytes of a layer's forward and backward pass, from shapes."""
    with torch.device("meta"):
        layer, x = LAYERS[name](), torch.empty(1, length, DIM, requires_grad=True)
        rotary = rotary_table(length, DIM // NUM_HEADS)
        memory = predict(layer, x, kwargs={"rotary": rotary})
        with FlopCounter() as counter:
            layer_step(layer, x, rotary)
    return {
        "attention": name,
        "length": length,
        "flops": counter.flops,
        "activation_bytes": memory.activation_bytes,
    }


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Return the least-squares slope of the logarithms."""
    xs, ys = [math.log(length) for length in lengths], [math.log(value) for value in values]
    return statistics.linear_regression(xs, ys).slope


def models_section(lengths: Sequence[int], depths: Sequence[int], picture: Path) -> Section:
    """Measure steps of models by length and by depth."""
    rows = []
    for attention in LAYERS:
        for depth in depths:
            for length in lengths:
                for way, policy in POLICIES.items():
                    with torch.device("meta"):
                        model, tokens = make_model(attention, depth, length, policy), torch.empty(1, length).long()
                        memory = predict(model, tokens, loss=loss_of)
                    row = {"attention": attention, "depth": depth, "length": length, "way": way}
                    row["activation_bytes"], row["seconds"] = memory.activation_bytes, None
                    if memory.activation_bytes <= MOST_BYTES and (depth == depths[0] or length < lengths[-1]):
                        row["seconds"] = round(model_seconds(attention, depth, length, policy), 3)
                    rows.append(row)
    plot_models(rows, picture)
    columns = [f"{way}, {length:,}" for length in lengths for way in POLICIES]
    lines = [
        "## A step of a model, by length and by depth",
        "",
        f"`ReversibleTransformer`, causal, {DIM} features in each stream, {NUM_HEADS} heads, {VOCAB_SIZE} tokens, a",
        "batch of 1; forward, cross-entropy and backward. Memory is the peak without parameters, their gradients and",
        "the input, predicted from shapes, which is exact. Times are for one step after one to warm up (without one",
        f"above 1,024 tokens), if it takes at most {MOST_BYTES // 2**30} GiB; for the longest sequences, only at the",
        "smallest depth.",
        "",
        f"![{picture.name}]({picture.name})",
        "",
    ]
    for key, title, show in (
        ("activation_bytes", "memory, MiB", mib),
        ("seconds", "time, s", lambda value: "" if value is None else f"{value:.2f}"),
    ):
        cells = []
        for attention in LAYERS:
            for depth in depths:
                selected = [row for row in rows if (row["attention"], row["depth"]) == (attention, depth)]
                cells.append([f"{attention}, {depth} blocks", *[show(row[key]) for row in selected]])
        lines += table((title, *columns), cells)
    return Section(lines, rows)


def make_model(attention: str, depth: int, length: int, policy: AbstractPolicy, ff_chunks: int = 1) -> nn.Module:
    """Return a language model."""
    return ReversibleTransformer(
        vocab_size=VOCAB_SIZE,
        dim=DIM,
        depth=depth,
        num_heads=NUM_HEADS,
        max_length=length,
        attention=attention,
        ff_chunks=ff_chunks,
        policy=policy,
    )


def loss_of(logits: Tensor) -> Tensor:
    """Return the cross-entropy for labels that are all 0."""
    return F.cross_entropy(logits[0], torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device))


def model_seconds(attention: str, depth: int, length: int, policy: AbstractPolicy) -> float:
    """Return the time of one step."""
    model, tokens = make_model(attention, depth, length, policy), torch.randint(VOCAB_SIZE, (1, length))
    if length <= 1024:
        loss_of(model(tokens)).backward()
    return timed(lambda: loss_of(model(tokens)).backward())


def timed(step: Callable[[], object]) -> float:
    """Return the processor time of a call, which excludes other programs."""
    start = time.process_time()
    step()
    return time.process_time() - start


def long_section(length: int, depths: Sequence[int], ff_chunks: int) -> Section:
    """Measure training steps on one long sequence."""
    rows = []
    for attention in ("lsh", "hierarchical"):
        for depth in depths:
            with torch.device("meta"):
                tokens = torch.empty(1, length).long()
                stored = predict(make_model(attention, depth, length, Store()), tokens, loss=loss_of)
                ours = predict(make_model(attention, depth, length, Reverse(), ff_chunks), tokens, loss=loss_of)
            result = in_new_process(train, attention, depth, length, ff_chunks, torch.get_num_threads())
            rows.append(
                {
                    "attention": attention,
                    "depth": depth,
                    "length": length,
                    "predicted_bytes": ours.activation_bytes,
                    "stored_bytes": stored.activation_bytes,
                    **result,
                }
            )
    columns = ("", "parameters", "predicted, MiB", "growth of the process, MiB", "step, s", "loss, nats by step")
    cells = [
        [
            f"{row['attention']}, {row['depth']} blocks",
            f"{row['parameters']:,}",
            mib(row["predicted_bytes"]),
            mib(row["process_growth_bytes"]),
            f"{row['step_seconds']:.1f}",
            row["losses"],
            mib(row["stored_bytes"]),
        ]
        for row in rows
    ]
    lines = [
        f"## Training on {length:,} tokens",
        "",
        f"The model above, with perceptrons in {ff_chunks} chunks, on {length:,} bytes of this library's source",
        f"code in one sequence: forward, cross-entropy with the next byte, backward, AdamW (1e-3); {NUM_STEPS} steps",
        "in a separate process. *Predicted*: the peak without parameters, gradients and input. *Growth*: the peak of",
        "resident memory minus the resident memory after a step with 256 tokens, when parameters, gradients and",
        "AdamW's state are allocated; the C library is set to return freed memory. *Stored*: the prediction for the",
        "stored twin, with perceptrons in one piece.",
        "",
        *table((*columns, "stored, MiB"), cells),
    ]
    return Section(lines, rows)


def train(attention: str, depth: int, length: int, ff_chunks: int, num_threads: int) -> Row:
    """Run steps in this process, which must be new, and return its growth."""
    give_back_freed()
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    model = make_model(attention, depth, length, Reverse(), ff_chunks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    source = b"".join(path.read_bytes() for path in sorted(Path(revnet.__file__).parent.rglob("*.py")))
    text = torch.tensor(list(source[: length + 1]))[None]

    def step(num_tokens: int) -> float:
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(text[:, :num_tokens])[0], text[0, 1 : num_tokens + 1])
        loss.backward()
        optimizer.step()
        return loss.item()

    step(256)
    before = resident_bytes()
    losses: list[float] = []
    seconds = [timed(lambda: losses.append(step(length))) for _ in range(NUM_STEPS)]
    peak = process_peak_bytes()
    assert peak is not None
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "process_growth_bytes": peak - before,
        "step_seconds": round(statistics.median(seconds), 2),
        "losses": ", ".join(f"{loss:.2f}" for loss in losses),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in TABLES:
        parser.add_argument(
            f"--{name}", action="store_true", help="measure this table only, or with other selected tables"
        )
    parser.add_argument("--lengths", type=numbers, default=[1024, 2048, 4096, 8192, 16_384], help="for the first table")
    parser.add_argument("--num-rounds", type=int, default=2, help="for the first table")
    parser.add_argument("--model-lengths", type=numbers, default=[1024, 4096, 16_384], help="for the second table")
    parser.add_argument("--depths", type=numbers, default=[2, 4, 8], help="for the second table")
    parser.add_argument("--long-length", type=int, default=16_384, help="for the third table")
    parser.add_argument("--long-depths", type=numbers, default=[2, 8], help="for the third table")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if min(given.num_rounds, len(given.lengths) - 1, *given.lengths, *given.model_lengths, *given.depths) < 1:
        parser.error("counts must be at least 1, and `--lengths` must have at least two numbers")
    check_matplotlib()
    names = [name for name in TABLES if getattr(given, name)]
    stem = f"{'-'.join(['attention', *names])}_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# Three kinds of attention: full, LSH and hierarchical",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/attention.py", *arguments])),
        "- Times are processor seconds, summed over threads, which exclude other programs.",
        "",
    ]
    for name in names or TABLES:
        picture = given.out_dir / f"{stem}_{name}.png"
        if name == "cost":
            section = cost_section(given.lengths, given.num_rounds, picture)
        elif name == "models":
            section = models_section(given.model_lengths, given.depths, picture)
        else:
            section = long_section(given.long_length, given.long_depths, ff_chunks=8)
        print(*section.lines, sep="\n", flush=True)
        page += section.lines
        write_csv(section.rows, given.out_dir / f"{stem}_{name}.csv")
        (given.out_dir / f"{stem}.md").write_text("\n".join(page).rstrip() + "\n")


def numbers(text: str) -> list[int]:
    """Parse comma-separated numbers."""
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
