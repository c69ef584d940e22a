import subprocess
import sys

import matplotlib.image
import pytest

from revnet._figure import check_matplotlib, clear_frame, new_figure, save, set_log_scale, write_title
from revnet.errors import MissingDependencyError


def test_figure_is_saved_as_png_under_any_name(tmp_path):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    clear_frame(axes)
    write_title(axes, "$ and $^$")  # It is not parsed as a formula, which would be invalid.
    save(figure, tmp_path / "picture.tmp")
    with (tmp_path / "picture.tmp").open("rb") as file:
        assert matplotlib.image.imread(file, format="png").shape[:2] == (3 * 150, 4 * 150)


def test_pyplot_is_not_loaded():
    code = (
        "import sys; from pathlib import Path; from revnet._figure import new_figure, save; "
        "save(new_figure(1, 1), Path('/dev/null')); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("use", [check_matplotlib, lambda: new_figure(1, 1)])
def test_missing_matplotlib_raises_one_line(monkeypatch, use):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"a figure needs matplotlib, which is not installed; run `pip"):
        use()


@pytest.mark.parametrize(
    ("least", "most", "labels"),
    [(0.6, 1.9, {"0.6", "0.7", "0.8", "0.9", "1"}), (0.03, 2.5, {"0.05", "0.1", "0.2", "0.5", "1", "2"})],
)
def test_labels_of_a_logarithmic_axis_are_plain_numbers(least, most, labels):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([1, 2], [least, most])
    set_log_scale(axes)
    axes.set_ylim(least, most)
    figure.draw_without_rendering()
    shown = {label.get_text() for label in axes.get_yticklabels(which="both") if label.get_text()}
    low, high = axes.get_ylim()
    assert {text for text in shown if low <= float(text) <= high} == labels
