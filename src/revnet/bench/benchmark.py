"""Run the whole benchmark and write a page, a table and figures."""

import datetime
from pathlib import Path

from revnet._atomic_file import write_text
from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet.bench import plot
from revnet.bench.report import markdown, write_csv
from revnet.bench.run import Settings, measure_all

_THEME = "engine"


def run_benchmark(settings: Settings, folder: Path, command: str) -> Path:
    """Measure everything and write `engine_<hardware>_<date>` as Markdown, CSV and PNG.

    Args:
        settings: Number of measurements, and the device.
        folder: Output folder. It is created if it does not exist.
        command: Command line that the page prints.

    Returns:
        The path of the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    results = measure_all(settings)
    stem = f"{_THEME}_{hardware_name(settings.device)}_{datetime.date.today()}"
    pictures = f"{stem}_memory.png", f"{stem}_time.png"
    # Before any file is written, because it records whether the checkout has changes.
    text = markdown(results, command, pictures)
    write_csv(results, folder / f"{stem}.csv")
    page = folder / f"{stem}.md"
    write_text(page, text)
    plot.plot_memory(results, folder / pictures[0])
    plot.plot_times(results, folder / pictures[1])
    return page
