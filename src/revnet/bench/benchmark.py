"""Run the whole benchmark and write a page, a table and figures."""

import datetime
from pathlib import Path

from revnet._atomic_file import write_text
from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet._result_files import begins_with, is_picture, make_results_folder, writing_to
from revnet.bench import plot
from revnet.bench.report import TITLE, Measurement, markdown, write_csv
from revnet.bench.run import QUICK, Settings, measure_all

_THEME = "engine"


def run_benchmark(settings: Settings, folder: Path, command: str) -> Path:
    """Measure everything and write `engine_<hardware>_<date>` as Markdown, CSV and PNG.

    With the depths of `QUICK`, the name begins with `engine-quick`.

    Args:
        settings: Number of measurements, and the device.
        folder: Output folder. It is created if it does not exist. Earlier results are replaced.
        command: Command line that the page prints.

    Returns:
        The path of the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: `folder` cannot be written, or holds another file with one of the names.
    """
    check_matplotlib()
    theme = f"{_THEME}-quick" if settings.memory_depths == QUICK.memory_depths else _THEME
    stem = f"{theme}_{hardware_name(settings.device)}_{datetime.date.today()}"
    page, table, pictures = f"{stem}.md", f"{stem}.csv", (f"{stem}_memory.png", f"{stem}_time.png")
    own = {page: begins_with(TITLE.encode()), table: begins_with(",".join(Measurement._fields).encode())}
    make_results_folder("out_dir", folder, own | dict.fromkeys(pictures, is_picture))
    results = measure_all(settings)
    # Before any file is written, because it records whether the checkout has changes.
    text = markdown(results, command, pictures)
    with writing_to("out_dir", folder):
        write_csv(results, folder / table)
        write_text(folder / page, text)
        plot.plot_memory(results, folder / pictures[0])
        plot.plot_times(results, folder / pictures[1])
    return folder / page
