"""The page and the CSV of `revnet bench --host`."""

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from revnet._atomic_file import write_csv, write_text
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet._result_files import begins_with, make_results_folder, writing_to
from revnet.bench.host import STEPS_PER_TURN, HostResults, measure_host, one_thread
from revnet.bench.host_cases import HOST_CASES, HOST_METHODS

_THEME = "host"
_TITLE = "# Processor time of a step on tiny tensors"
_COLUMNS = (
    *("case", "blocks", "method", "step_seconds", "half_block_microseconds"),
    *("ratio_first_quartile", "ratio_median", "ratio_third_quartile", "least_over_least"),
    *("revnet_calls", "revnet_files", "revnet_lines", "note"),
)


def run_host_benchmark(num_rounds: int, folder: Path, command: str) -> Path:
    """Measure the processor time of a step and write `host_<hardware>_<date>` as Markdown and CSV.

    Args:
        num_rounds: Number of turns of each method.
        folder: Output folder. It is created if it does not exist. Earlier results are replaced.
        command: Command line that the page prints.

    Returns:
        The path of the page.

    Raises:
        ValueError: `folder` cannot be written, or holds another file with one of the names.
    """
    page = folder / f"{_THEME}_{hardware_name()}_{datetime.date.today()}.md"
    table = page.with_suffix(".csv")
    own = {page.name: begins_with(_TITLE.encode()), table.name: begins_with(",".join(_COLUMNS).encode())}
    make_results_folder("out_dir", folder, own)
    load = _load()
    results = measure_host(num_rounds)
    with one_thread():  # the page prints the number of threads
        text = host_markdown(results, command, load=f"{load} before, {_load()} after")
    with writing_to("out_dir", folder):
        _write_csv(results, table)
        write_text(page, text)
    return page


def host_markdown(results: HostResults, command: str, *, load: str) -> str:
    """Return the page: hardware, versions and workloads, then a table for each case.

    Args:
        results: All measurements.
        command: Command line that the page prints.
        load: Load average of the machine.
    """
    peers = {method.package: method.version() or "not installed" for method in HOST_METHODS if method.package}
    lines = [
        _TITLE,
        "",
        *describe_machine(command, peers=peers),
        f"- Load average over one minute: {load}",
        f"- Workloads, {results.num_blocks} blocks in float32, same functions, weights and input for all methods:",
        *[f"  - {case.name}: {case.description}" for case in HOST_CASES],
        "- Methods:",
        *[f"  - {method.name}: {method.description}" for method in HOST_METHODS],
        "",
        "A step is the forward pass, the loss `y.square().mean()` and the backward pass; the input requires a "
        "gradient. Times are processor time on one thread. "
        f"In each of {results.num_rounds} rounds, every method runs one step to warm up and {STEPS_PER_TURN} timed "
        "steps; the order of the methods changes. *Step / plain* is the median over rounds of the ratio within the "
        "round, with first and third quartile; *least / least* compares the fastest turns. Microseconds are the median "
        "step divided by the number of half-blocks (residual functions); *above plain* is the method's overhead.",
        "",
    ]
    for case in HOST_CASES:
        lines += _table(results, case.name)
    lines += _calls_section(results)
    return "\n".join(lines).rstrip() + "\n"


def _table(results: HostResults, case: str) -> Iterator[str]:
    rows = [row for row in results.rows if row.case == case]
    plain = rows[0].times
    assert plain is not None
    yield f"| {case} | step / plain | quartiles | least / least | microseconds per half-block | above plain |"
    yield f"| --- |{' ---: |' * 5}"
    for row in rows:
        if row.times is not None:
            ratio, cost = row.times.over_plain, results.microseconds(row.times)
            cells = [f"{ratio.median:.2f}", f"{ratio.first:.2f}-{ratio.third:.2f}", f"{row.times.least_over_least:.2f}"]
            cells += [f"{cost:.0f}", f"{cost - results.microseconds(plain):.0f}"]
            yield f"| {row.method} | {' | '.join(cells)} |"
    yield ""
    for row in rows:
        if row.note:
            yield f"- {row.method}: {row.note}"
    yield ""


def _calls_section(results: HostResults) -> Iterator[str]:
    yield "## Python calls inside revnet"
    yield ""
    yield (
        "Calls in one step, divided by the number of half-blocks; the files that define the called functions; and the "
        "lines of these files, which a reader needs to follow the step. The counts are exact. Calls into PyTorch and "
        "into the residual functions are not counted."
    )
    yield ""
    yield "| case | method | calls per half-block | files | lines |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for row in results.rows:
        if row.calls is not None and row.calls.num_calls:
            cells = [row.case, row.method, f"{row.calls.num_calls / results.num_half_blocks:.1f}"]
            yield f"| {' | '.join([*cells, str(row.calls.num_files), f'{row.calls.num_lines:,}'])} |"


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _write_csv(results: HostResults, path: Path) -> None:
    rows: list[tuple[Any, ...]] = [_COLUMNS]
    for row in results.rows:
        values: tuple[float | str, ...] = ("",) * 6
        if row.times is not None:
            step, ratio = row.times.step_seconds, row.times.over_plain
            values = (step, results.microseconds(row.times), ratio.first, ratio.median, ratio.third)
            values = (*values, row.times.least_over_least)
        calls = ("",) * 3 if row.calls is None else (row.calls.num_calls, row.calls.num_files, row.calls.num_lines)
        rows.append((row.case, results.num_blocks, row.method, *values, *calls, row.note))
    write_csv(path, rows)
