"""Write the measured complexities as a Markdown page, a CSV file and a figure."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from revnet._atomic_file import write_csv, write_text
from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet._result_files import begins_with, is_picture, make_results_folder, writing_to
from revnet.bench import METHODS
from revnet.bench.report import Measurement
from revnet.paper.complexity import draw
from revnet.paper.complexity.costs import (
    QUICK_COMPLEXITY,
    TECHNIQUES,
    Complexity,
    ComplexitySettings,
    Technique,
    growth_exponent,
    measure_complexity,
)

_MIB, _GIGA = 2**20, 1e9
_TITLE = "# Complexity of methods to run reversible blocks"


def run_complexity(
    settings: ComplexitySettings, folder: Path, command: str, *, say: Callable[[str], None] = print
) -> Path:
    """Measure the paper's table of complexities and write `complexity_<hardware>_<date>` as Markdown, CSV and PNG.

    With the depths of `QUICK_COMPLEXITY`, the name begins with `complexity-quick`.

    Args:
        settings: Number of measurements, and the device.
        folder: Output folder. It is created if it does not exist. Earlier results are replaced.
        command: Command line that the page prints.
        say: Function that receives a line for each result.

    Returns:
        The path of the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: `folder` cannot be written, or holds another file with one of the names.
    """
    check_matplotlib()
    is_quick = settings.memory_depths == QUICK_COMPLEXITY.memory_depths
    figure = "complexity-quick" if is_quick else "complexity"
    name = f"{figure}_{hardware_name(settings.device)}_{datetime.date.today()}"
    page, table, picture = f"{name}.md", f"{name}.csv", f"{name}.png"
    columns = begins_with(",".join(Measurement._fields).encode())
    make_results_folder("out_dir", folder, {page: begins_with(_TITLE.encode()), table: columns, picture: is_picture})
    complexity = measure_complexity(settings, say)
    with writing_to("out_dir", folder):
        write_text(folder / page, "\n".join(_page(complexity, command, name)).rstrip() + "\n")
        write_csv(folder / table, [Measurement._fields, *_measurements(complexity)])
        draw.plot(complexity, folder / picture)
    return folder / page


def _measurements(complexity: Complexity) -> Iterator[Measurement]:
    """Yield every measurement."""
    case = complexity.settings.case.name
    for cost in complexity.costs:
        for quantity, value, unit in (
            ("peak", cost.peak_bytes, "B"),
            ("held after forward", cost.held_bytes, "B"),
            ("arithmetic", cost.flops, "FLOP"),
        ):
            yield Measurement(case, cost.depth, cost.method, quantity, value, unit)
    for row in complexity.times:
        if row.times is None:
            yield Measurement(case, row.depth, row.method, "step", "", "s", row.note)
            continue
        quartiles = row.times.over_plain
        yield Measurement(case, row.depth, row.method, "step", row.times.step_seconds, "s")
        yield Measurement(case, row.depth, row.method, "step / plain, first quartile", quartiles.first, "1")
        yield Measurement(case, row.depth, row.method, "step / plain, median", quartiles.median, "1")
        yield Measurement(case, row.depth, row.method, "step / plain, third quartile", quartiles.third, "1")


def _page(complexity: Complexity, command: str, name: str) -> Iterator[str]:
    settings = complexity.settings
    described = {method.name: method.description for method in METHODS}
    yield _TITLE
    yield ""
    yield from describe_machine(command, device=settings.device)
    yield f"- Workload, in float32, the same for all techniques: {settings.case.description}"
    yield "- Techniques:"
    for technique in TECHNIQUES:
        yield f"  - {technique.title}: {described[technique.method]}"
    yield ""
    yield f"![{name}.png]({name}.png)"
    yield ""
    yield from _memory_section(complexity)
    yield from _compute_section(complexity)
    yield from _time_section(complexity)


def _memory_section(complexity: Complexity) -> Iterator[str]:
    yield "## Memory: peak of one step, MiB"
    yield ""
    yield (
        "Bytes in addition to parameters, gradients, buffers and the input, counted from shapes. The exponent is the "
        "slope of log bytes against log depth, over all depths and between the last two: 1 is linear growth, 0.5 the "
        "square root, 0 constant. Logarithmic growth adds the same number of bytes whenever the depth is multiplied."
    )
    yield ""
    depths = complexity.settings.memory_depths
    yield from _heading(["paper: activations", *_blocks(depths), "exponent", "last two depths"])
    for technique in TECHNIQUES:
        peaks = [cost.peak_bytes for cost in complexity.costs_of(technique)]
        cells = [_paper(technique.activations), *(f"{peak / _MIB:,.1f}" for peak in peaks)]
        yield _row(technique, [*cells, *_exponents(depths, peaks)])
    yield ""


def _compute_section(complexity: Complexity) -> Iterator[str]:
    yield "## Compute: arithmetic of one step, GFLOP (ratio to naive)"
    yield ""
    yield (
        "Convolutions and matrix products of the forward and backward pass, including recomputation, two operations "
        "for each multiply-add. A checkpoint may skip the last product when it recomputes; rebuilding the input needs "
        "the whole residual."
    )
    yield ""
    depths = complexity.settings.memory_depths
    naive = [cost.flops for cost in complexity.costs_of(TECHNIQUES[0])]
    yield from _heading(["paper: compute", *_blocks(depths), "exponent", "last two depths"])
    for technique in TECHNIQUES:
        flops = [cost.flops for cost in complexity.costs_of(technique)]
        cells = [f"{a / _GIGA:,.1f} ({a / b:.2f})" for a, b in zip(flops, naive, strict=True)]
        yield _row(technique, [_paper(technique.compute), *cells, *_exponents(depths, flops)])
    yield ""


def _time_section(complexity: Complexity) -> Iterator[str]:
    settings = complexity.settings
    if not settings.time_depths:
        return
    yield "## Time: one step, s (ratio to naive: median, first and third quartile)"
    yield ""
    yield (
        f"Median of {settings.num_rounds} rounds after one to warm up; each round measures a step of every technique, "
        "starting with a different one. Ratios are taken within the round."
    )
    yield ""
    yield from _heading(_blocks(settings.time_depths))
    for technique in TECHNIQUES:
        cells = []
        for row in complexity.times_of(technique):
            if row.times is None:
                cells.append(row.note)
                continue
            ratio = row.times.over_plain
            spread = f"{ratio.median:.2f}, {ratio.first:.2f}-{ratio.third:.2f}"
            cells.append(f"{row.times.step_seconds:.3f} ({spread})")
        yield _row(technique, cells)


def _heading(columns: Sequence[str]) -> Iterator[str]:
    yield f"| | {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"


def _row(technique: Technique, cells: Sequence[str]) -> str:
    return f"| {technique.title} | {' | '.join(cells)} |"


def _blocks(depths: Sequence[int]) -> list[str]:
    return [f"{depth} block{'s' if depth > 1 else ''}" for depth in depths]


def _exponents(depths: Sequence[int], values: Sequence[int]) -> list[str]:
    """Return the exponents over all depths and between the last two."""
    exponents = growth_exponent(depths, values), growth_exponent(depths[-2:], values[-2:])
    return [f"{exponent + 0.0:.2f}" for exponent in exponents]


def _paper(order: str | None) -> str:
    return order or "not in the table"
