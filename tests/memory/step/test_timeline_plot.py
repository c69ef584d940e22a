from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from revnet.memory import format_bytes, measure
from revnet.memory.step import _timeline_plot
from revnet.memory.step._memory_parts import Timeline
from revnet.memory.step._timeline_plot import plot_timeline
from tests.helpers import assert_something_is_drawn, keep_saved_figures, texts_of

MIB = 2**20


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that were saved."""
    return keep_saved_figures(monkeypatch, _timeline_plot)


@pytest.fixture(scope="module")
def memory():
    model = nn.Sequential(nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 10))
    return measure(model, torch.randn(500, 100), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def test_shows_each_part_and_the_peak(tmp_path, drawn, memory):
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
def test_draws_every_timeline(tmp_path, drawn, memory, num_points, has_optimizer):
    activations = torch.randint(0, MIB, (num_points,)).numpy()
    timeline = Timeline(
        activation_bytes=activations,
        gradient_bytes=np.zeros(num_points, np.int64),
        constant_bytes=0,
        module_indices=np.zeros(num_points, np.int64),
        backward_start=num_points // 2,
        optimizer_start=num_points - has_optimizer,
    )
    empty = replace(memory.at_peak, parameters=0, buffers=0, optimizer=0, inputs=0)
    memory = replace(memory, peak_bytes=int(activations.max()), at_peak=empty, timeline=timeline)
    memory = replace(memory, peak_module=".".join(["a name that is far too long $"] * 9))
    plot_timeline(memory, tmp_path / "timeline.png", title="$ and $^$")
    assert_something_is_drawn(tmp_path / "timeline.png")
    (figure,) = drawn
    assert [text.get_text().split("  ")[0] for text in figure.legends[0].get_texts()] == ["activations"]
    assert ("optimizer" in texts_of(figure)) is has_optimizer
    (area,) = figure.axes[0].collections
    heights = area.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(memory.peak_bytes / 1024)
    assert len(heights) < 5 * _timeline_plot._MOST_COLUMNS
    assert len(texts_of(figure)[-1].splitlines()[1]) < 60
