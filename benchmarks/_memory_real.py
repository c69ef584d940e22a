"""The third table of `memory.py`: whether a process stays within a budget, not the count alone."""

import ctypes
import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from _memory_page import MIB, Row, Section, mib, table
from _memory_step import OPTIMIZER, images_of, loss, make, on_meta
from torch import Tensor

from revnet import Store, set_policy
from revnet._machine import process_peak_bytes
from revnet._picture import clear_frame, new_figure, save, write_title
from revnet.memory import Plan, format_bytes, measure, plan, predict

PAIRS = {
    "revnet38": "resnet32",
    "revnet56": "resnet50",
    "revnet104": "resnet101",
    "revnet110": "resnet110",
    "revnet164": "resnet164",
}
"""The ordinary network of the same size, for each reversible one."""
NUM_STEPS = 3
"""Steps whose growth is read: later ones find the gaps that the first one left."""
MMAP_THRESHOLD = 131072
"""glibc's own at the start; said by hand, it stays, and freed tensors go back to the system at once."""


def real_section(name: str, batch_size: int, fraction: float, picture: Path) -> Section:
    """The planned model, the plain one and its pair, each in processes of its own.

    Raises:
        BudgetError: The model cannot be made to fit.
    """
    model, images = on_meta(name, batch_size)
    set_policy(model, Store())
    plain_bytes = predict(model, images, optimizer=OPTIMIZER, loss=loss).peak_bytes
    chosen = plan(model, images, budget=int(fraction * plain_bytes), optimizer=OPTIMIZER, loss=loss)
    methods = {
        f"{name}, plain": (name, None),
        f"{name}, planned": (name, chosen),
        f"{PAIRS[name]}, plain": (PAIRS[name], None),
    }
    rows = []
    for title, (model_name, its_plan) in methods.items():
        for keeps_freed in (False, True):
            found = in_new_process(run_steps, model_name, batch_size, its_plan, torch.get_num_threads(), keeps_freed)
            rows.append({"model": title, "budget_bytes": chosen.budget_bytes, **found})
    draw(rows, picture, title=f"A budget of {_percent(fraction)} of plain {name}, batch {batch_size}")
    return Section(lines_of(name, batch_size, fraction, rows, chosen, picture), rows)


def in_new_process(function: Callable[..., Row], *args: object) -> Row:
    """Call `function` where nothing has happened yet.

    A process that is executed inherits its parent's peak of memory; one that a server forks, which did nothing but
    import PyTorch, does not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def run_steps(name: str, batch_size: int, its_plan: Plan | None, num_threads: int, keeps_freed: bool) -> Row:
    """Run steps in this process, which must be new, and see how it grows."""
    if not keeps_freed:
        give_back_freed()
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    model, images = make(name), images_of(name, batch_size)
    set_policy(model, Store())
    if its_plan is not None:
        its_plan.apply(model)
    optimizer = OPTIMIZER(model.parameters())

    def step(images: Tensor) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(model(images)).backward()
        optimizer.step()
        return time.perf_counter() - start

    step(images[:2].clone())  # What libraries need for themselves, and the optimizer's state.
    optimizer.zero_grad()
    gc.collect()
    before = resident_bytes()
    seconds = [step(images) for _ in range(NUM_STEPS)]
    peak = process_peak_bytes()
    assert peak is not None  # There is `resource`.
    counted = measure(model, images, optimizer=OPTIMIZER, loss=loss)
    constant = counted.parameter_bytes + counted.buffer_bytes + counted.input_bytes + counted.optimizer_bytes
    return {
        "allocator": "default" if keeps_freed else "gives back",
        "counted_peak_bytes": counted.peak_bytes,
        "counted_growth_bytes": counted.peak_bytes - constant,
        "process_growth_bytes": peak - before,
        "process_bytes": peak - before + constant,
        "step_seconds": statistics.median(seconds),
    }


def give_back_freed() -> None:
    """Do what `MALLOC_MMAP_THRESHOLD_` in the environment does."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, MMAP_THRESHOLD)


def resident_bytes() -> int:
    """Memory of this process now, on Linux."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * resource.getpagesize()


def lines_of(
    name: str, batch_size: int, fraction: float, rows: Sequence[Row], chosen: Plan, picture: Path
) -> list[str]:
    """The section of the page."""
    columns = ("", "allocator", "counted, MiB", "within", "counted growth, MiB", "growth of the process, MiB")
    return [
        f"## {name} in {_percent(fraction)} of its plain memory, batch {batch_size}",
        "",
        f"Budget: {format_bytes(chosen.budget_bytes)}. Each in a process of its own. *Growth of the process*: the peak",
        f"of its resident memory in {NUM_STEPS} steps, above what was resident before them, when it had made one step",
        "of two images: model, input and momentum were there already, and *process* adds them. It has what kernels use",
        "inside. With its *default* settings the C library keeps much of what was freed, in pieces that the next",
        f"tensor may not fit into; *gives back* is `MALLOC_MMAP_THRESHOLD_={MMAP_THRESHOLD}` in the environment.",
        "",
        f"![{picture.name}]({picture.name})",
        "",
        *table((*columns, "process, MiB", "within", "step, s"), [_cells(row) for row in rows]),
        "The plan:",
        "",
        "```text",
        *chosen.report().splitlines(),
        "```",
        "",
    ]


def _cells(row: Row) -> list[str]:
    budget = row["budget_bytes"]
    return [
        row["model"],
        row["allocator"],
        mib(row["counted_peak_bytes"]),
        "yes" if row["counted_peak_bytes"] <= budget else "no",
        mib(row["counted_growth_bytes"]),
        mib(row["process_growth_bytes"]),
        mib(row["process_bytes"]),
        "yes" if row["process_bytes"] <= budget else "no",
        f"{row['step_seconds']:.2f}",
    ]


def draw(rows: Sequence[Row], picture: Path, *, title: str) -> None:
    """Bars of what was counted and of the processes, and the budget."""
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    returning, keeping = rows[::2], rows[1::2]
    for shift, bars, label, color in (
        (-0.27, [row["counted_peak_bytes"] for row in returning], "counted", "#4477aa"),
        (0.0, [row["process_bytes"] for row in returning], "process, freed memory given back", "#66ccee"),
        (0.27, [row["process_bytes"] for row in keeping], "process, default allocator", "#bbbbbb"),
    ):
        places = [shift + place for place in range(len(bars))]
        drawn = axes.barh(places, [size / MIB for size in bars], height=0.25, color=color, label=label)
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.axvline(rows[0]["budget_bytes"] / MIB, color="#333333", linestyle="--", linewidth=1, label="budget")
    axes.set_yticks(range(len(returning)), [row["model"] for row in returning])
    axes.invert_yaxis()
    axes.set_xlabel("peak memory of a step (MiB)")
    clear_frame(axes)
    axes.grid(axis="y", visible=False)
    write_title(axes, title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, picture)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"
