"""The third table of `memory.py`: whether the memory of a process stays within a budget."""

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
from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._memory_readings import process_peak_bytes
from revnet._palette import BLUE, CYAN, INK, LIGHT_GRAY
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
"""Number of steps whose growth is measured. Later steps reuse gaps that the first one left."""
MMAP_THRESHOLD = 131072
"""Initial value of glibc. If it is set explicitly, it stays fixed, and freed tensors return to the system at once."""


def real_section(name: str, batch_size: int, fraction: float, picture: Path) -> Section:
    """Measure the planned model, the plain model and its pair, each in separate processes.

    Raises:
        BudgetError: The model cannot be made to fit.
    """
    model, images = on_meta(name, batch_size)
    set_policy(model, Store())
    plain_bytes = predict(model, images, optimizer=OPTIMIZER, loss=loss).peak_bytes
    chosen = plan(model, images, budget=int(fraction * plain_bytes), optimizer=OPTIMIZER, loss=loss)
    variants = {
        f"{name}, plain": (name, None),
        f"{name}, planned": (name, chosen),
        f"{PAIRS[name]}, plain": (PAIRS[name], None),
    }
    rows = []
    for title, (model_name, chosen_plan) in variants.items():
        for keeps_freed in (False, True):
            result = in_new_process(
                run_steps, model_name, batch_size, chosen_plan, torch.get_num_threads(), keeps_freed
            )
            rows.append({"model": title, "budget_bytes": chosen.budget_bytes, **result})
    draw(rows, picture, title=f"A budget of {_percent(fraction)} of plain {name}, batch {batch_size}")
    return Section(lines_of(name, batch_size, fraction, rows, chosen, picture), rows)


def in_new_process(function: Callable[..., Row], *args: object) -> Row:
    """Call `function` in a new process.

    A spawned process inherits the memory peak of its parent. A process forked from a server that has only imported
    PyTorch does not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def run_steps(name: str, batch_size: int, chosen_plan: Plan | None, num_threads: int, keeps_freed: bool) -> Row:
    """Run steps in this process, which must be new, and return its growth."""
    if not keeps_freed:
        give_back_freed()
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    model, images = make(name), images_of(name, batch_size)
    set_policy(model, Store())
    if chosen_plan is not None:
        chosen_plan.apply(model)
    optimizer = OPTIMIZER(model.parameters())

    def step(images: Tensor) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(model(images)).backward()
        optimizer.step()
        return time.perf_counter() - start

    step(images[:2].clone())  # allocates the memory of libraries and the optimizer's state
    optimizer.zero_grad()
    gc.collect()
    before = resident_bytes()
    seconds = [step(images) for _ in range(NUM_STEPS)]
    peak = process_peak_bytes()
    assert peak is not None  # this system has `resource`
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
    """Set `MALLOC_MMAP_THRESHOLD_` from within the process."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, MMAP_THRESHOLD)


def resident_bytes() -> int:
    """Return the resident memory of this process, on Linux."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * resource.getpagesize()


def lines_of(
    name: str, batch_size: int, fraction: float, rows: Sequence[Row], chosen: Plan, picture: Path
) -> list[str]:
    """Return the lines of the page."""
    columns = ("", "allocator", "counted, MiB", "within", "counted growth, MiB", "growth of the process, MiB")
    return [
        f"## {name} in {_percent(fraction)} of its plain memory, batch {batch_size}",
        "",
        f"Budget: {format_bytes(chosen.budget_bytes)}. Each row is a separate process. *Growth of the process*: the",
        f"peak of resident memory in {NUM_STEPS} steps minus the resident memory after one step with two images, when",
        "model, input and momentum are allocated; *process* adds them. It includes memory inside kernels. With the",
        "*default* settings the C library keeps much of the freed memory, in pieces that may be too small for the next",
        f"tensor; *gives back* sets `MALLOC_MMAP_THRESHOLD_={MMAP_THRESHOLD}`.",
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
    """Draw bars of the counted bytes and the processes, and the budget."""
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    returning, keeping = rows[::2], rows[1::2]
    for shift, bars, label, color in (
        (-0.27, [row["counted_peak_bytes"] for row in returning], "counted", BLUE),
        (0.0, [row["process_bytes"] for row in returning], "process, freed memory given back", CYAN),
        (0.27, [row["process_bytes"] for row in keeping], "process, default allocator", LIGHT_GRAY),
    ):
        heights = [shift + index for index in range(len(bars))]
        drawn = axes.barh(heights, [size / MIB for size in bars], height=0.25, color=color, label=label)
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.axvline(rows[0]["budget_bytes"] / MIB, color=INK, linestyle="--", linewidth=1, label="budget")
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
