from itertools import combinations, pairwise

import pytest

from revnet.memory import format_bytes
from revnet.memory.planning import _plan_plot
from revnet.memory.planning._plan_plot import plot_plan
from revnet.memory.planning._planned_unit import PlanPoint
from tests.helpers import assert_something_is_drawn, keep_saved_figures, texts_of

GIB = 2**30
POINTS = [PlanPoint(3 * GIB, 1.4), PlanPoint(5 * GIB, 1.3), PlanPoint(9 * GIB, 1.1), PlanPoint(20 * GIB, 1.0)]
CHOSEN = PlanPoint(9 * GIB, 1.1)
REFERENCES = {
    "plain autograd": PlanPoint(20 * GIB, 1.0),
    "checkpoint each block": PlanPoint(6 * GIB, 1.35),
    "reverse all": PlanPoint(3 * GIB, 1.4),
}
MANY = {f"{name}{suffix}": point for suffix in ("", ".", "..") for name, point in REFERENCES.items()}


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that were saved."""
    return keep_saved_figures(monkeypatch, _plan_plot)


@pytest.mark.parametrize(
    ("budget_bytes", "references"),
    [
        (10 * GIB, REFERENCES),
        (3 * GIB, REFERENCES),
        (500 * GIB, REFERENCES),
        (None, {}),
        (20 * GIB, MANY),
    ],
)
def test_draws_every_plan(tmp_path, drawn, budget_bytes, references):
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
def test_labels_stay_inside_and_do_not_overlap(tmp_path, drawn, scale, num_points):
    points = [PlanPoint(peak // scale, time) for peak, time in POINTS[:num_points]]
    references = {name: PlanPoint(peak // scale, time) for name, (peak, time) in REFERENCES.items()}
    plot_plan(points, points[-1], references, tmp_path / "plan.png", title="", budget_bytes=None)
    (axes,) = drawn[0].axes
    frame = axes.get_window_extent()
    boxes = [text.get_window_extent() for text in axes.texts]
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)


def test_a_reference_that_equals_the_plan_shares_its_label(tmp_path, drawn):
    plot_plan(POINTS, POINTS[0], REFERENCES, tmp_path / "plan.png", title="", budget_bytes=3 * GIB)
    texts = texts_of(drawn[0])
    assert "this plan = reverse all\n3.00 GiB, 1.40x" in texts
    assert sum("reverse all" in text for text in texts) == 1


def test_the_staircase_shows_the_fastest_plan_that_fits(tmp_path, drawn):
    """Between two plans, the smaller one is the fastest that fits; beyond the last, more memory gains nothing."""
    plot_plan(POINTS, CHOSEN, {}, tmp_path / "plan.png", title="", budget_bytes=None)
    (axes,) = drawn[0].axes
    staircase = next(line for line in axes.get_lines() if len(line.get_xdata()) > 2)
    x, y = staircase.get_data()
    assert staircase.get_drawstyle() == "steps-post"
    assert list(zip(x, y, strict=True))[:-1] == [(peak / GIB, time) for peak, time in POINTS]
    assert (x[-1], y[-1]) == (axes.get_xlim()[1], 1.0)
    assert all(left < right for left, right in pairwise(x))
