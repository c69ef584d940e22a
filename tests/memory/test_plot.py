from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

from revnet.memory import Timeline, _plot, format_bytes, measure
from revnet.memory._plot import plot_plan, plot_timeline

MIB, GIB = 2**20, 2**30
POINTS = [(3 * GIB, 1.4), (5 * GIB, 1.3), (9 * GIB, 1.1), (20 * GIB, 1.0)]
CHOSEN = ("this plan", 9 * GIB, 1.1)
REFERENCES = [
    ("plain autograd", 20 * GIB, 1.0),
    ("checkpoint each block", 6 * GIB, 1.35),
    ("reverse all", 3 * GIB, 1.4),
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], _plot.save

    def keep_and_save(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(_plot, "save", keep_and_save)
    return figures


@pytest.fixture(scope="module")
def memory():
    model = nn.Sequential(nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 10))
    return measure(model, torch.randn(500, 100), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def assert_something_is_drawn(path):
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_timeline_shows_each_part_and_the_peak(tmp_path, drawn, memory):
    plot_timeline(memory, tmp_path / "timeline.png", title="two layers")
    assert_something_is_drawn(tmp_path / "timeline.png")
    (figure,) = drawn
    (axes,) = figure.axes
    (legend,) = figure.legends
    at_peak = memory.at_peak
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{name}  {format_bytes(num_bytes)}"
        for name, num_bytes in (
            ("activations", at_peak.held + at_peak.transient),
            ("gradients", at_peak.gradients),
            ("inputs", 500 * 100 * 4),
            ("optimizer state", memory.parameter_bytes),
            ("parameters and buffers", memory.parameter_bytes),
        )
    ]
    highest = max(path.vertices[:, 1].max() for area in axes.collections for path in area.get_paths())
    unit = {"memory (MiB)": MIB, "memory (KiB)": 1024}[axes.get_ylabel()]
    assert highest == pytest.approx(memory.peak_bytes / unit)
    *phases, peak = texts_of(figure)
    assert phases[:2] == ["forward", "backward"]
    where = f"{memory.peak_phase}, {memory.peak_module}" if memory.peak_module else memory.peak_phase
    assert peak == f"peak {format_bytes(memory.peak_bytes)}\n{where}"


@pytest.mark.parametrize(("num_points", "has_optimizer"), [(2, False), (7, True), (5000, True)])
def test_every_timeline_has_a_picture(tmp_path, drawn, memory, num_points, has_optimizer):
    activations = torch.randint(0, MIB, (num_points,)).numpy()
    timeline = Timeline(
        activation_bytes=activations,
        gradient_bytes=np.zeros(num_points, np.int64),
        constant_bytes=0,
        module_indices=np.zeros(num_points, np.int64),
        backward_start=num_points // 2,
        optimizer_start=num_points - has_optimizer,
    )
    nothing = replace(memory.at_peak, parameters=0, buffers=0, optimizer=0, inputs=0)
    memory = replace(memory, peak_bytes=int(activations.max()), at_peak=nothing, timeline=timeline)
    memory = replace(memory, peak_module=".".join(["a name that is far too long $"] * 9))
    plot_timeline(memory, tmp_path / "timeline.png", title="$ and $^$")
    assert_something_is_drawn(tmp_path / "timeline.png")
    (figure,) = drawn
    assert [text.get_text().split("  ")[0] for text in figure.legends[0].get_texts()] == ["activations"]
    assert ("optimizer" in texts_of(figure)) is has_optimizer
    (area,) = figure.axes[0].collections
    heights = area.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(memory.peak_bytes / 1024)
    assert len(heights) < 5 * _plot._MOST_COLUMNS
    assert len(texts_of(figure)[-1].splitlines()[1]) < 60


@pytest.mark.parametrize(
    ("budget_bytes", "references"),
    [
        (10 * GIB, REFERENCES),
        (3 * GIB, REFERENCES),
        (500 * GIB, REFERENCES),
        (None, []),
        (20 * GIB, REFERENCES * 3),
    ],
)
def test_every_plan_has_a_picture(tmp_path, drawn, budget_bytes, references):
    plot_plan(POINTS, CHOSEN, references, tmp_path / "plan.png", title="$ and $^$", budget_bytes=budget_bytes)
    assert_something_is_drawn(tmp_path / "plan.png")
    texts = texts_of(drawn[0])
    assert "this plan\n9.00 GiB, 1.10x" in texts
    assert ("reverse all\n3.00 GiB, 1.40x" in texts) is bool(references)
    arrow = " ->" if budget_bytes == 500 * GIB else ""
    assert [text for text in texts if "budget" in text] == (
        [f"budget {format_bytes(budget_bytes)}{arrow}"] if budget_bytes else []
    )


@pytest.mark.parametrize(("num_points", "scale"), [(1, 1), (2, 1000), (4, 4096), (4, 2**29)])
def test_labels_stay_inside_and_cover_no_other(tmp_path, drawn, scale, num_points):
    points = [(peak // scale, time) for peak, time in POINTS[:num_points]]
    references = [(name, peak // scale, time) for name, peak, time in REFERENCES]
    plot_plan(points, ("this plan", *points[-1]), references, tmp_path / "plan.png", title="", budget_bytes=None)
    (axes,) = drawn[0].axes
    frame = axes.get_window_extent()
    boxes = [text.get_window_extent() for text in axes.texts]
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)


def test_a_reference_that_is_the_plan_is_named_with_it(tmp_path, drawn):
    plot_plan(POINTS, ("this plan", *POINTS[0]), REFERENCES, tmp_path / "plan.png", title="", budget_bytes=3 * GIB)
    texts = texts_of(drawn[0])
    assert "this plan = reverse all\n3.00 GiB, 1.40x" in texts
    assert sum("reverse all" in text for text in texts) == 1


def test_the_staircase_says_what_fits(tmp_path, drawn):
    """Between two plans the time is that of the smaller one; beyond the last there is nothing to gain."""
    plot_plan(POINTS, CHOSEN, [], tmp_path / "plan.png", title="", budget_bytes=None)
    (axes,) = drawn[0].axes
    staircase = next(line for line in axes.get_lines() if len(line.get_xdata()) > 2)
    x, y = staircase.get_data()
    assert staircase.get_drawstyle() == "steps-post"
    assert list(zip(x, y, strict=True))[:-1] == [(peak / GIB, time) for peak, time in POINTS]
    assert (x[-1], y[-1]) == (axes.get_xlim()[1], 1.0)
    assert all(left < right for left, right in pairwise(x))
