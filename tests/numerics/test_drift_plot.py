import math

import pytest
import torch
from torch import nn

from revnet import Checkpoint, Reverse, Store
from revnet.coupling import FixedPoint
from revnet.numerics import Drift, _drift_plot, measure_drift
from revnet.numerics._block_drift import BlockDrift, GradientDrift
from tests.helpers import keep_saved_figures
from tests.numerics.test_measure_drift import Shifting, perceptrons

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that were saved."""
    return keep_saved_figures(monkeypatch, _drift_plot)


def drift_of_errors(errors, amplifications=None, gradients=None, part=""):
    size = len(errors)
    return Drift(
        tuple(
            BlockDrift(f"{part}blocks.{index}", Reverse(), False, error, amplification, gradient)
            for index, (error, amplification, gradient) in enumerate(
                zip(errors, amplifications or [None] * size, gradients or [None] * size, strict=True)
            )
        ),
        torch.float32,
    )


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_draws_every_kind_of_drift(tmp_path):
    x = torch.randn(4, 16)
    exact = perceptrons()
    for block in exact:
        block.coupling = FixedPoint()
    broken = perceptrons()
    broken[5].g = Shifting(0.5, math.inf).float()
    for name, model in (
        ("float", perceptrons(policy=[Reverse()] * 5 + [Checkpoint()])),
        ("exact", exact),
        ("kept", perceptrons(policy=Store())),
        ("broken", broken),
        ("parts", nn.Sequential(perceptrons(), perceptrons())),
    ):
        path = tmp_path / f"{name}.png"
        measure_drift(model, x, gradients=name != "broken").plot(path, title=name)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_errors_of_zero_have_a_marker(tmp_path, drawn):
    gradients = [GradientDrift(0.0, 0.0), GradientDrift(1e-6, 0.1), None]
    drift_of_errors([1e-6, 0.0, None], gradients=gradients).plot(tmp_path / "drift.png")
    (figure,) = drawn
    names = ["activations, as rebuilt", "gradients of the block", "activations, error 0", "gradients, error 0"]
    assert legend_of(figure) == [*names, "kept, not rebuilt"]
    errors = figure.axes[0]
    markers = {line.get_label(): line for line in errors.get_lines()}
    assert list(markers["activations, error 0"].get_xdata()) == [1]
    assert list(markers["gradients, error 0"].get_xdata()) == [0]
    low, high = errors.get_ylim()
    assert all(low < height < high for line in markers.values() for height in line.get_ydata() if len(line.get_xdata()))


@pytest.mark.parametrize(("outlier", "scale"), [(2.0, "linear"), (105689.0, "log"), (1e-4, "log")])
def test_an_outlier_does_not_hide_the_other_amplifications(tmp_path, drawn, outlier, scale):
    amplifications = [1.5, outlier, 1.5, 1.5, None]
    drift_of_errors([1e-6] * 5, amplifications).plot(tmp_path / "drift.png")
    growth = drawn[0].axes[1]
    assert growth.get_yscale() == scale
    low, high = growth.get_ylim()
    assert low < min(1, outlier)
    assert high > max(1.5, outlier)


def test_a_long_title_covers_nothing(tmp_path, drawn):
    title = "runs/" + "a_long_name_of_a_run/" * 8 + "last.safetensors, batch 32"
    blocks = [
        block
        for part in ("encoder.a_stage_with_a_long_name.reversible.", "decoder.")
        for block in drift_of_errors([1e-6] * 3, part=part).blocks
    ]
    Drift(tuple(blocks), torch.float32).plot(tmp_path / "drift.png", title=title)
    (figure,) = drawn
    errors = figure.axes[0]
    assert errors.get_title(loc="left").replace("\n", "") == title
    title_box = errors._left_title.get_window_extent()
    others = [*(text.get_window_extent() for text in errors.texts), figure.legends[0].get_window_extent()]
    assert title_box.x1 <= figure.bbox.x1
    assert not title_box.count_overlaps(others)


def test_lists_of_blocks_have_their_names(tmp_path, drawn):
    names = ["stages.0.reversible.blocks", "layer1", "host.blocks"]
    blocks = [BlockDrift(f"{name}.{index}", Reverse(), False, 1e-6, None) for name in names for index in (0, 1)]
    Drift(tuple(blocks), torch.float32).plot(tmp_path / "drift.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert [text for text in texts if text in ("stages.0", "layer1", "host")] == ["stages.0", "layer1", "host"]
