"""Write the results as a Markdown page and a CSV file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from revnet._atomic_file import write_csv as write_rows
from revnet._provenance import describe_machine
from revnet.bench.cases import CASES
from revnet.bench.methods import METHODS, Method
from revnet.bench.pitfalls import PITFALLS
from revnet.bench.run import NUM_WARMUP_ROUNDS, MemoryRow, Results, TimeRow

TITLE = "# Memory, time and correctness of reversible engines"
"""First line of the page."""
_MIB = 2**20


class Measurement(NamedTuple):
    """One row of the CSV."""

    case: str
    """Name of the workload, or "pitfalls"."""
    depth: int | None
    method: str
    quantity: str
    value: float | str
    unit: str
    note: str = ""


def measurements(results: Results) -> Iterator[Measurement]:
    """Yield every measurement."""
    for m in results.memory:
        for quantity, value in (("peak", m.peak_bytes), ("held after forward", m.held_bytes)):
            yield Measurement(m.case, m.depth, m.method, quantity, _or_empty(value), "B", m.note)
    for case, seconds in results.forward_seconds.items():
        yield Measurement(case, results.settings.time_depth, "plain", "forward without gradients", seconds, "s")
    for t in results.times:
        values: dict[str, tuple[float | None, str]] = {
            "gradient error to plain": (t.error_to_plain, "relative L2"),
            "gradient error to float64": (t.error_to_float64, "relative L2"),
        }
        if t.times is not None:
            values["step"] = t.times.step_seconds, "s"
            values["median step / median plain step"] = t.times.median_over_plain_median, "1"
            for name, quartiles in (("plain", t.times.over_plain), ("ideal", t.times.over_ideal)):
                values[f"step / {name}, first quartile"] = quartiles.first, "1"
                values[f"step / {name}, median"] = quartiles.median, "1"
                values[f"step / {name}, third quartile"] = quartiles.third, "1"
        for quantity, (number, unit) in values.items():
            yield Measurement(t.case, t.depth, t.method, quantity, _or_empty(number), unit, t.note)
    for r in results.pitfalls:
        yield Measurement("pitfalls", None, r.method, r.pitfall, r.outcome, "", r.note)


def write_csv(results: Results, path: Path) -> None:
    """Write all measurements, one per row."""
    write_rows(path, [Measurement._fields, *measurements(results)])


def markdown(results: Results, command: str, pictures: Sequence[str] = ()) -> str:
    """Return the page: hardware, versions and workloads, then the tables.

    Args:
        results: All measurements.
        command: Command line to print on the page.
        pictures: File names of the figures, relative to the page.
    """
    settings = results.settings
    peers = {method.package: method.version() or "not installed" for method in METHODS if method.package}
    lines = [
        TITLE,
        "",
        *describe_machine(command, device=settings.device, peers=peers),
        "- Workloads, in float32, with the same residual functions, weights and input for all methods:",
        *[f"  - {case.name}: {case.description}" for case in CASES],
        "- Methods:",
        *[f"  - {method.name}: {method.description}{_where_missing(method)}" for method in METHODS],
        "",
        *[f"![{picture}]({picture})" for picture in pictures],
        "",
        *_memory_section(results),
        *_time_section(results),
        *_pitfall_section(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _memory_section(results: Results) -> Iterator[str]:
    cuda = results.settings.device.type == "cuda"
    yield "## Memory of one step, MiB: peak (held between forward and backward)"
    yield ""
    yield (
        "Bytes in addition to parameters, gradients, buffers and the input, "
        + ("as PyTorch's allocator counts them." if cuda else "counted exactly, without memory inside kernels.")
        + " All methods take and return both streams as one tensor."
    )
    yield ""
    for case in CASES:
        depths = sorted({row.depth for row in results.memory if row.case == case.name})
        yield f"| {case.name} | {' | '.join(f'{depth} blocks' for depth in depths)} |"
        yield f"| --- |{' ---: |' * len(depths)}"
        for method in METHODS:
            rows = [row for row in results.memory if (row.case, row.method) == (case.name, method.name)]
            yield f"| {method.name} | {' | '.join(_memory_cell(row) for row in rows)} |"
        yield ""
    yield from _failures(results.memory)


def _memory_cell(row: MemoryRow) -> str:
    if row.peak_bytes is None or row.held_bytes is None:
        return _short(row.note)
    return f"{row.peak_bytes / _MIB:,.1f} ({row.held_bytes / _MIB:,.1f})"


def _time_section(results: Results) -> Iterator[str]:
    settings = results.settings
    yield f"## Time and gradients, {settings.time_depth} blocks"
    yield ""
    yield (
        f"{settings.num_rounds} rounds after {NUM_WARMUP_ROUNDS} to warm up; each round measures a step (forward and "
        "backward) of every method, starting with a different one. Ratios are medians over rounds of the ratio within "
        "the round, with first and third quartile. *Ideal* is a plain step plus one plain forward pass under "
        "`torch.no_grad`: the cost of computing every residual function twice. The gradient error is the largest "
        "relative L2 distance of a parameter's gradient from plain autograd in float32 and in float64. A few ReLU "
        "inputs that round to the other side of zero are enough for 1e-3; compare the row of plain autograd."
    )
    yield ""
    for case in CASES:
        yield (
            f"| {case.name} | step, s | step / plain | quartiles | median / median | step / ideal | quartiles "
            "| gradient error to plain | to float64 |"
        )
        yield f"| --- |{' ---: |' * 8}"
        for row in results.times:
            if row.case == case.name:
                yield f"| {row.method} | {' | '.join(_time_cells(row))} |"
        yield ""
        yield f"Forward pass of plain under `torch.no_grad`: {results.forward_seconds[case.name]:.3f} s."
        yield ""
    yield from _failures(results.times)


def _time_cells(row: TimeRow) -> list[str]:
    times = row.times
    if times is None or row.error_to_plain is None or row.error_to_float64 is None:
        return [_short(row.note)] + [""] * 7
    plain, ideal = times.over_plain, times.over_ideal
    return [
        f"{times.step_seconds:.3f}",
        f"{plain.median:.3f}",
        f"{plain.first:.3f}-{plain.third:.3f}",
        f"{times.median_over_plain_median:.3f}",
        f"{ideal.median:.3f}",
        f"{ideal.first:.3f}-{ideal.third:.3f}",
        f"{row.error_to_plain:.1e}",
        f"{row.error_to_float64:.1e}",
    ]


def _pitfall_section(results: Results) -> Iterator[str]:
    yield "## Pitfalls"
    yield ""
    yield (
        "Three tiny blocks in float64 (autocast: float32) on the CPU, each method and pitfall in a separate process. "
        "Gradients, buffers and the random state are compared with plain autograd. *ok*: they are the same, or, if the "
        "output was modified, an error says so. *wrong*: the numbers differ, without an error. *raises*: an error, "
        "whose first line is in the CSV. *crashes*: the process died."
    )
    yield ""
    yield f"| pitfall | {' | '.join(method.name for method in METHODS)} |"
    yield f"| --- |{' --- |' * len(METHODS)}"
    rows = {(row.pitfall, row.method): row for row in results.pitfalls}
    for pitfall in PITFALLS:
        cells = [rows[pitfall.name, method.name] for method in METHODS if (pitfall.name, method.name) in rows]
        yield f"| {pitfall.name} | {' | '.join(_pitfall_cell(row.outcome, row.note) for row in cells)} |"


def _pitfall_cell(outcome: str, note: str) -> str:
    return outcome if outcome == "ok" else f"**{outcome}**" if outcome else _short(note)


def _failures(rows: Sequence[MemoryRow] | Sequence[TimeRow]) -> Iterator[str]:
    """Yield the error messages, which do not fit into the table."""
    for row in rows:
        if row.note and _short(row.note) == "failed":
            yield f"- {row.method}, {row.case}, {row.depth} blocks: `{row.note}`"
    yield ""


def _short(note: str) -> str:
    return next((known for known in ("not installed", "not run") if note.startswith(known)), "failed")


def _where_missing(method: Method) -> str:
    missing = method.missing()
    return f" ({missing})" if missing else ""


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value
