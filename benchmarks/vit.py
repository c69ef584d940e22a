"""Reversible vision transformers: memory, step time and round trips compared with the stored twin, and a training run.

    revnet train --config cifar10/quick/revvit_cifar --out-dir runs/revvit
    python benchmarks/vit.py runs/revvit

Memory by depth is predicted from shapes, for Rev-ViT-S with other numbers of blocks. Steps of the CIFAR network are run
and their bytes counted. Writes a page, a CSV for each table and a figure to benchmarks/results/.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _memory_page import Row, Section, mib, table, write_sections
from _training_page import check_run, training_section
from torch import Tensor

from revnet import Reverse, Store
from revnet._figure import check_matplotlib, clear_frame, new_figure, save, write_title
from revnet._hardware import hardware_name
from revnet._palette import BLUE, PURPLE
from revnet._provenance import describe_machine
from revnet.memory import measure, predict
from revnet.models import ReversibleViT
from revnet.nn import AbstractPolicy

RESULTS = Path(__file__).parent / "results"
POLICIES: dict[str, AbstractPolicy] = {"reversible": Reverse(), "stored": Store()}
COLORS = {"reversible": BLUE, "stored": PURPLE}
SMALL = {"dim": 384, "num_heads": 6}
CIFAR = {"img_size": 32, "patch_size": 4, "dim": 192, "num_heads": 6, "mlp_ratio": 2, "num_classes": 10}
DEPTHS = (6, 12, 24, 48)
CIFAR_DEPTHS = (3, 9, 27)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="folder of a training run to include")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.batch_size < 1:
        parser.error(f"--batch-size {given.batch_size} must be at least 1")
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    if given.run is not None:
        check_run(parser, given.run)
    check_matplotlib()
    stem = f"revvit_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# Reversible vision transformers",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/vit.py", *arguments])),
        "- *Activations*: the peak memory of a training step in float32, without parameters, their gradients and the",
        "  input. The stored twin is the same network with `policy=Store()`.",
        "",
    ]
    sections = {
        "depth": depth_section(given.batch_size, given.out_dir / f"{stem}.png"),
        "steps": step_section(given.batch_size),
    }
    if given.run is not None:
        sections["training"] = training_section(given.run)
    write_sections(page, sections, given.out_dir / stem)


def depth_section(batch_size: int, picture: Path) -> Section:
    """Predict the memory of Rev-ViT-S with other numbers of blocks."""
    rows = []
    for depth in DEPTHS:
        row: Row = {"depth": depth}
        for name, policy in POLICIES.items():
            with torch.device("meta"):
                model, images = ReversibleViT(**SMALL, depth=depth, policy=policy), torch.empty(batch_size, 3, 224, 224)
            row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            row[f"{name}_bytes"] = predict(model, images).activation_bytes
        rows.append(row)
    draw(rows, picture, title=f"Rev-ViT-S, a step of {batch_size} images of 224x224")
    cells = [
        [
            str(row["depth"]),
            f"{row['parameters']:,}",
            mib(row["reversible_bytes"]),
            mib(row["stored_bytes"]),
            f"{row['stored_bytes'] / row['reversible_bytes']:.1f} times",
        ]
        for row in rows
    ]
    lines = [
        f"## Rev-ViT-S by depth, {batch_size} images of 224x224",
        "",
        "Predicted from shapes; the published network has 12 blocks.",
        "",
        f"![{picture.name}]({picture.name})",
        "",
        *table(("blocks", "parameters", "activations, MiB", "stored, MiB", "less"), cells),
    ]
    return Section(lines, rows)


def draw(rows: Sequence[Row], picture: Path, *, title: str) -> None:
    """Draw activations against depth."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    depths = [row["depth"] for row in rows]
    for name, color in COLORS.items():
        sizes = [row[f"{name}_bytes"] / 2**30 for row in rows]
        axes.plot(depths, sizes, marker="o", color=color, label=name)
        axes.annotate(f"{sizes[-1]:.2f} GiB", (depths[-1], sizes[-1]), (-4, 7), textcoords="offset points", ha="right")
    axes.set_xticks(depths)
    axes.set_ylim(0, 1.12 * max(row["stored_bytes"] for row in rows) / 2**30)  # room for the last label
    axes.set_xlabel("blocks")
    axes.set_ylabel("activations of a step (GiB)")
    clear_frame(axes)
    write_title(axes, title)
    axes.legend(frameon=False, loc="upper left")
    save(figure, picture)


def step_section(batch_size: int) -> Section:
    """Measure bytes, time and the round-trip error of the CIFAR network."""
    images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    models = {}
    for depth in CIFAR_DEPTHS:
        for name, policy in POLICIES.items():
            torch.manual_seed(0)
            models[depth, name] = ReversibleViT(**CIFAR, depth=depth, policy=policy)
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in models}
    for _ in range(6):
        for key, model in models.items():
            seconds[key].append(step_seconds(model, images))
    rows = []
    for depth in CIFAR_DEPTHS:
        row: Row = {"depth": depth, "round_trip_error": round_trip_error(models[depth, "reversible"], images)}
        for name in POLICIES:
            row[f"{name}_bytes"] = measure(models[depth, name], images).activation_bytes
            row[f"{name}_step_seconds"] = statistics.median(seconds[depth, name][1:])  # the first step warms up
        rows.append(row)
    cells = [
        [
            str(row["depth"]),
            mib(row["reversible_bytes"]),
            mib(row["stored_bytes"]),
            f"{row['reversible_step_seconds'] / row['stored_step_seconds']:.2f}",
            f"{row['round_trip_error']:.0e}",
        ]
        for row in rows
    ]
    lines = [
        f"## Rev-ViT for CIFAR in real steps, {batch_size} images of 32x32",
        "",
        "Activations are counted while the step runs. *Step*: forward and backward, medians of five in turn. *Inverse",
        "error*: the largest difference between the inverse of the last block's output and the first block's input,",
        "relative to the largest element; in float32, at initialization.",
        "",
        *table(("blocks", "activations, MiB", "stored, MiB", "step / stored", "inverse error"), cells),
    ]
    return Section(lines, rows)


def step_seconds(model: ReversibleViT, images: Tensor) -> float:
    """Return the time of one step."""
    start = time.perf_counter()
    F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64)).backward()
    return time.perf_counter() - start


def round_trip_error(model: ReversibleViT, images: Tensor) -> float:
    """Return the relative error of the blocks' inverse."""
    inputs: list[Tensor] = []
    hook = model.stages.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    outputs: list[Tensor] = []
    second = model.stages.register_forward_hook(lambda _module, _given, y: outputs.append(y))
    with torch.no_grad():
        model(images)
        back = model.stages.inverse(outputs[0])
    hook.remove()
    second.remove()
    return ((back - inputs[0]).abs().max() / inputs[0].abs().max()).item()


if __name__ == "__main__":
    main()
