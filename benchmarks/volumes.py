"""The partially reversible 3-D U-Net and its stored twin: memory, time, training and round trips.

    python benchmarks/volumes.py

Memory by depth is predicted for the published network, and counted in real steps of a small one. The small network and
its twin are trained on synthetic volumes, in turn, from the same weights. Writes a page, a CSV for each table and a
figure to benchmarks/results/.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from _memory_page import Row, Section, mib, table, write_sections
from _volumes_balls import balls, batches, dice
from torch import Tensor

from revnet import Reverse, ReversibleSequential, Store
from revnet._figure import check_matplotlib, clear_frame, new_figure, save, write_title
from revnet._hardware import hardware_name
from revnet._palette import BLUE, PURPLE
from revnet._provenance import describe_machine
from revnet.memory import max_patch_size, measure, predict
from revnet.models import UNet3d
from revnet.nn import AbstractPolicy

RESULTS = Path(__file__).parent / "results"
DEPTHS = (1, 2, 4, 8)
POLICIES: dict[str, AbstractPolicy] = {"reversible": Reverse(), "stored": Store()}
COLORS = {"reversible": BLUE, "stored": PURPLE}
SMALL = {"in_channels": 1, "num_classes": 1, "widths": (8, 16, 32)}
BUDGETS_GIB = (8, 16, 24)
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="side of the volume for the published network")
    parser.add_argument("--small-size", type=int, default=24, help="side of the volumes that are run")
    parser.add_argument("--num-updates", type=int, default=40)
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.size % 16 or given.small_size % 4 or min(given.size, given.small_size, given.num_updates) < 1:
        parser.error("--size must be a multiple of 16, --small-size a multiple of 4, and all numbers at least 1")
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    check_matplotlib()
    stem = f"volumes_{hardware_name()}_{datetime.date.today()}"
    picture = given.out_dir / f"{stem}.png"
    sections = {
        "depth": depth_section(given.size, picture),
        "size": size_section(),
        "small": small_section(given.small_size),
        "training": training_section(given.small_size, given.num_updates),
    }
    page = [
        "# Volumes: the partially reversible 3-D U-Net",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/volumes.py", *arguments])),
        "- Bytes are for one training step on one volume, in float32, SGD with momentum: *peak* includes everything,",
        "and   *activations* excludes parameters, their gradients and the input. *Blocks* is the number per level, in",
        "the   encoder and in the decoder. The stored twin is the same network with `policy=Store()`.",
        "",
    ]
    write_sections(page, sections, given.out_dir / stem)


def optimizer(parameters: object) -> torch.optim.Optimizer:
    """Return the optimizer whose memory is counted."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # type: ignore[arg-type]


# Memory by depth ------------------------------------------------------------------------------------------------------


def depth_section(size: int, picture: Path) -> Section:
    """Predict the memory of the published network with increasing numbers of blocks."""
    rows = []
    for num_blocks in DEPTHS:
        for name, policy in POLICIES.items():
            with torch.device("meta"):
                model, x = UNet3d(num_blocks=num_blocks, policy=policy), torch.empty(1, 4, size, size, size)
            memory = predict(model, x, optimizer=optimizer)
            rows.append(
                {
                    "blocks": num_blocks,
                    "way": name,
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "activation_bytes": memory.activation_bytes,
                    "held_bytes": memory.held_bytes,
                    "peak_bytes": memory.peak_bytes,
                }
            )
    draw(rows, picture, title=f"3-D U-Net, one volume of {size}x{size}x{size}")
    columns = ("blocks", "parameters", "activations, MiB", "stored", "less", "peak, MiB", "stored")
    cells = []
    for own, twin in zip(rows[::2], rows[1::2], strict=True):
        cells.append(
            [
                str(own["blocks"]),
                f"{own['parameters']:,}",
                mib(own["activation_bytes"]),
                mib(twin["activation_bytes"]),
                f"{twin['activation_bytes'] / own['activation_bytes']:.1f} times",
                mib(own["peak_bytes"]),
                mib(twin["peak_bytes"]),
            ]
        )
    lines = [
        f"## The published network by depth, at {size}x{size}x{size}",
        "",
        "Predicted from shapes. From two blocks on, activations do not grow.",
        "",
        f"![{picture.name}]({picture.name})",
        "",
        *table(columns, cells),
    ]
    return Section(lines, rows)


def draw(rows: Sequence[Row], picture: Path, *, title: str) -> None:
    """Draw activations against the number of blocks."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for name, color in COLORS.items():
        own = [row for row in rows if row["way"] == name]
        depths, sizes = [row["blocks"] for row in own], [row["activation_bytes"] / GIB for row in own]
        axes.plot(depths, sizes, marker="o", color=color, label=name)
        axes.annotate(f"{sizes[-1]:.1f} GiB", (depths[-1], sizes[-1]), (-4, 7), textcoords="offset points", ha="right")
    axes.set_xticks(DEPTHS)
    axes.set_ylim(0, 1.12 * max(row["activation_bytes"] for row in rows) / GIB)  # room for the last label
    axes.set_xlabel("reversible blocks per level")
    axes.set_ylabel("activations of a step (GiB)")
    clear_frame(axes)
    write_title(axes, title)
    axes.legend(frameon=False, loc="upper left")
    save(figure, picture)


# Largest cube ---------------------------------------------------------------------------------------------------------


def size_section() -> Section:
    """Find the largest cube whose step fits."""
    rows = []
    num_blocks = 2
    for budget in BUDGETS_GIB:
        sizes = {name: largest(num_blocks, policy, budget * GIB) for name, policy in POLICIES.items()}
        rows.append({"blocks": num_blocks, "budget_gib": budget, **{f"{name}_side": sizes[name] for name in sizes}})
    cells = [
        [
            str(row["blocks"]),
            f"{row['budget_gib']} GiB",
            *[f"{row[f'{name}_side']}x{row[f'{name}_side']}x{row[f'{name}_side']}" for name in POLICIES],
            f"{(row['reversible_side'] / row['stored_side']) ** 3:.1f}",
        ]
        for row in rows
    ]
    lines = [
        "## The largest cube that fits",
        "",
        "The published network, one volume, sides in steps of 16; predicted peaks within the budget.",
        "",
        *table(("blocks", "budget", "reversible", "stored", "voxels, times"), cells),
    ]
    return Section(lines, rows)


def largest(num_blocks: int, policy: AbstractPolicy, budget_bytes: int) -> int:
    """Return the side of the largest cube within the budget."""
    with torch.device("meta"):
        model = UNet3d(num_blocks=num_blocks, policy=policy)
        x = torch.empty(1, 4, 64, 64, 64)
    return max_patch_size(model, x, budget=budget_bytes, optimizer=optimizer)


# Measurements ---------------------------------------------------------------------------------------------------------


def small_section(size: int) -> Section:
    """Measure bytes, time and round-trip errors of a small network."""
    volumes, masks = balls(2, size, torch.Generator().manual_seed(0))
    models = {}
    for num_blocks in DEPTHS:
        for name, policy in POLICIES.items():
            torch.manual_seed(0)
            models[num_blocks, name] = UNet3d(**SMALL, num_blocks=num_blocks, policy=policy)
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in models}
    for _ in range(4):
        for key, model in models.items():
            start = time.perf_counter()
            F.binary_cross_entropy_with_logits(model(volumes), masks.float()).backward()
            seconds[key].append(time.perf_counter() - start)
    rows = []
    for (num_blocks, name), model in models.items():
        counted = measure(model, volumes, optimizer=optimizer)
        rows.append(
            {
                "blocks": num_blocks,
                "way": name,
                "counted_activation_bytes": counted.activation_bytes,
                "predicted_activation_bytes": predict(model, volumes, optimizer=optimizer).activation_bytes,
                "step_seconds": statistics.median(seconds[num_blocks, name][1:]),  # the first step warms up
                "round_trip_error": round_trip_error(model, volumes),
            }
        )
    cells = []
    for own, twin in zip(rows[::2], rows[1::2], strict=True):
        cells.append(
            [
                str(own["blocks"]),
                mib(own["counted_activation_bytes"]),
                mib(own["predicted_activation_bytes"]),
                mib(twin["counted_activation_bytes"]),
                mib(twin["predicted_activation_bytes"]),
                f"{own['step_seconds'] / twin['step_seconds']:.2f}",
                f"{own['round_trip_error']:.0e}",
            ]
        )
    columns = ("blocks", "counted, MiB", "predicted", "stored, counted", "predicted", "step / stored", "inverse error")
    widths = ", ".join(map(str, SMALL["widths"]))
    lines = [
        f"## A small network in real steps, on two volumes of {size}x{size}x{size}",
        "",
        f"Widths {widths}. Activations are counted while the step runs. *Step*: forward and backward, medians of three",
        "in turn. *Inverse error*: the largest difference between the inverse of the output of a level's blocks and",
        "their input, relative to the largest element; in float32, at initialization.",
        "",
        *table(columns, cells),
    ]
    return Section(lines, rows)


def round_trip_error(model: UNet3d, volumes: Tensor) -> float:
    """Return the largest relative error of the inverse over all levels."""
    errors = []

    def compare(blocks: ReversibleSequential, inputs: tuple[Tensor], y: Tensor) -> None:
        x = inputs[0]
        errors.append(((blocks.inverse(y) - x).abs().max() / x.abs().max()).item())

    hooks = [blocks.register_forward_hook(compare) for blocks in [*model.encoder, *model.decoder]]
    with torch.no_grad():
        model(volumes)
    for hook in hooks:
        hook.remove()
    return max(errors)


def training_section(size: int, num_updates: int) -> Section:
    """Train the network and its twin from the same weights with the same volumes."""
    models, optimizers, losses = {}, {}, {}
    for name, policy in POLICIES.items():
        torch.manual_seed(0)
        models[name] = UNet3d(**SMALL, num_blocks=2, policy=policy)
        optimizers[name] = torch.optim.Adam(models[name].parameters(), lr=1e-2)
    test_volumes, test_masks = balls(8, size, torch.Generator().manual_seed(1))
    rows = []
    for update, (volumes, masks) in enumerate(islice(batches(2, size, seed=0), num_updates + 1)):
        if update in (0, num_updates // 4, num_updates // 2, num_updates):
            row: Row = {"updates": update}
            for name, model in models.items():
                with torch.no_grad():
                    row[f"{name}_dice"] = dice(model(test_volumes) > 0, test_masks)
            rows.append({**row, **{f"{name}_loss": losses.get(name) for name in models}})
        for name, model in models.items():
            optimizers[name].zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(volumes), masks.float())
            loss.backward()
            optimizers[name].step()
            losses[name] = loss.item()
    threshold = max(dice(test_volumes > level, test_masks) for level in torch.arange(0, 3, 0.1))
    num_parameters = sum(parameter.numel() for parameter in models["reversible"].parameters())
    columns = ("updates", "Dice, reversible", "Dice, stored", "loss, reversible", "loss, stored")
    cells = [
        [
            str(row["updates"]),
            *[f"{row[f'{name}_dice']:.3f}" for name in models],
            *["" if row[f"{name}_loss"] is None else f"{row[f'{name}_loss']:.4f}" for name in models],
        ]
        for row in rows
    ]
    lines = [
        "## Training",
        "",
        f"The small network with two blocks per level, {num_parameters:,} parameters, on two new volumes of",
        f"{size}x{size}x{size} in every update: noise with one ball, brighter by one standard deviation of the noise.",
        f"Adam, learning rate 0.01. Dice on 8 other volumes; the best threshold on voxels reaches {threshold:.3f}.",
        "",
        *table(columns, cells),
    ]
    return Section(lines, rows)


if __name__ == "__main__":
    main()
