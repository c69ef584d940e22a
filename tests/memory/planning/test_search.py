from itertools import pairwise, product

import numpy as np
import pytest

from revnet.memory.planning._search import ChainCosts, find_frontier


def random_chain(rng, num_units, num_choices=None, *, most_held=30, most_transient=60, most_seconds=None, pairs=False):
    """Return random costs: small integers, which make ties, or random times without ties if `most_seconds` is None.

    A small `most_transient` gives many best assignments. With `pairs`, times depend on the next choice, too.
    """
    choices = [num_choices or int(rng.integers(1, 4)) for _ in range(num_units)]
    shapes = list(pairwise([*choices, 1])) if pairs else choices
    return ChainCosts(
        held=[rng.integers(0, most_held, shape) for shape in pairwise([*choices, 1])],
        transient=[rng.integers(0, most_transient, count) for count in choices],
        seconds=[rng.integers(0, most_seconds, count) if most_seconds else rng.random(count) for count in shapes],
        base=int(rng.integers(0, 50)),
        floor=int(rng.integers(0, 200)),
        fixed_seconds=float(rng.integers(0, 3)),
    )


def all_assignments(costs):
    return list(product(*(range(len(unit)) for unit in costs.transient)))


def best_by_trying_all(costs):
    best = []
    for peak, seconds in sorted((costs.peak(choices), costs.time(choices)) for choices in all_assignments(costs)):
        if not best or seconds < best[-1][1]:
            best.append((peak, seconds))
    return best


def figures(frontier):
    return [(point.peak_bytes, point.seconds) for point in frontier.points]


def assert_true_figures(frontier, costs):
    assert figures(frontier) == [(costs.peak(point.choices), costs.time(point.choices)) for point in frontier.points]
    for before, after in pairwise(frontier.points):
        assert before.peak_bytes < after.peak_bytes
        assert before.seconds > after.seconds


@pytest.mark.parametrize("most_seconds", [None, 3, 20], ids=["no ties", "many ties", "some ties"])
@pytest.mark.parametrize("seed", range(40))
def test_equals_exhaustive_search(seed, most_seconds):
    rng = np.random.default_rng(seed)
    costs = random_chain(rng, num_units=int(rng.integers(1, 8)), most_seconds=most_seconds, pairs=seed % 2 == 1)
    frontier = find_frontier(costs)
    assert frontier.is_exact
    assert figures(frontier) == best_by_trying_all(costs)
    assert_true_figures(frontier, costs)


def test_by_hand():
    """Two units that may store (100 bytes, 1 s) or reverse (10 bytes, 2 s), but reversing after storing holds 40."""
    costs = ChainCosts(
        held=[[[100, 40], [10, 10]], [[100], [10]]],
        transient=[[110, 60], [120, 70]],
        seconds=[[1.0, 2.0], [1.0, 2.0]],
        base=1000,
        floor=0,
        fixed_seconds=0.5,
    )
    assert costs.peak((0, 0)) == 1000 + 100 + 120
    assert costs.peak((0, 1)) == 1000 + max(110, 40 + 70)
    assert costs.peak((1, 1)) == 1000 + max(60, 10 + 70)
    assert figures(find_frontier(costs)) == [(1080, 4.5), (1110, 3.5), (1220, 2.5)]
    assert [point.choices for point in find_frontier(costs).points] == [(1, 1), (0, 1), (0, 0)]


def test_peaks_below_the_floor_tie():
    costs = ChainCosts([[[5], [1]]], [[5, 1]], [[1.0, 2.0]], base=10, floor=15, fixed_seconds=0.0)
    assert figures(find_frontier(costs)) == [(15, 1.0)]


def test_no_units():
    frontier = find_frontier(ChainCosts([], [], [], base=10, floor=7, fixed_seconds=2.5))
    assert figures(frontier) == [(10, 2.5)]
    assert frontier.points[0].choices == ()
    assert figures(find_frontier(ChainCosts([], [], [], base=0, floor=7, fixed_seconds=0.0))) == [(7, 0.0)]


def test_ties_keep_the_lowest_choice():
    shape = [(3, 3)] * 9 + [(3, 1)]
    costs = ChainCosts([np.full(pair, 7) for pair in shape], [np.full(3, 9)] * 10, [np.full(3, 0.1)] * 10, 0, 0, 0.3)
    (point,) = find_frontier(costs).points
    assert point.choices == (0,) * 10
    assert point.peak_bytes == 9 * 7 + 9


def test_equal_units_tie_exactly():
    """Times with many digits add up to the same sum in any order, so that only the least peak remains."""
    num_units, times = 60, np.array([0.1, 0.1 / 3, 0.1 / 7])
    held = np.array([1, 4, 9])
    costs = ChainCosts(
        [np.repeat(held[:, None], 3, axis=1)] * (num_units - 1) + [held[:, None]],
        [held + 1] * num_units,
        [times] * num_units,
        0,
        0,
        0.0,
    )
    frontier = find_frontier(costs)
    assert frontier.is_exact
    assert_true_figures(frontier, costs)
    by_counts = sorted({point.seconds for point in frontier.points}, reverse=True)
    assert len(by_counts) == len(frontier.points) <= (num_units + 1) * (num_units + 2) // 2
    gaps = [before.seconds - after.seconds for before, after in pairwise(frontier.points)]
    assert min(gaps) > 1e-6  # no two that differ by rounding alone


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("max_points", [2, 3, 10])
def test_a_thinned_frontier_has_true_figures_and_keeps_both_ends(seed, max_points):
    costs = random_chain(np.random.default_rng(seed), num_units=20, num_choices=3, most_held=10**6)
    exact, thinned = find_frontier(costs), find_frontier(costs, max_points=max_points)
    assert exact.is_exact
    assert len(thinned.points) <= max_points
    assert not thinned.is_exact
    assert_true_figures(thinned, costs)
    assert thinned.points[0].peak_bytes == exact.points[0].peak_bytes
    assert thinned.points[-1].seconds == exact.points[-1].seconds


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("max_points", [3, 4])
def test_a_thinned_frontier_keeps_its_bound(seed, max_points):
    """For each exact point, some kept point is as fast, with a peak above it by at most the sum of the distances."""
    num_units = 7
    costs = random_chain(np.random.default_rng(seed), num_units, num_choices=3, most_held=10**6)
    exact, thinned = find_frontier(costs), find_frontier(costs, max_points=max_points)
    assert not thinned.is_exact
    spans = []
    for first in range(num_units):
        rest = ChainCosts(costs.held[first:], costs.transient[first:], costs.seconds[first:], 0, 0, 0.0)
        peaks = [rest.peak(choices) for choices in all_assignments(rest)]
        spans.append(max(peaks) - min(peaks))
    most_excess = (sum(spans) + spans[0]) / (max_points - 1)  # the last for the thinning of the whole
    for point in exact.points:
        assert any(
            other.seconds <= point.seconds and other.peak_bytes <= point.peak_bytes + most_excess
            for other in thinned.points
        )


def test_a_thousand_units():
    costs = random_chain(np.random.default_rng(0), num_units=1000, num_choices=3, most_held=10**8)
    frontier = find_frontier(costs, max_points=200)
    assert not frontier.is_exact
    assert 20 < len(frontier.points) <= 200
    assert_true_figures(frontier, costs)
    assert frontier.points[-1].seconds == costs.time([int(times.min(1).argmin()) for times in costs.seconds])


def test_large_byte_counts_are_exact():
    held = [[2**51 + 1, 2**51]]
    costs = ChainCosts([np.array(held).T], held, [[1.0, 2.0]], base=1, floor=0, fixed_seconds=0.0)
    assert figures(find_frontier(costs)) == [(2**51 + 1, 2.0), (2**51 + 2, 1.0)]


GOOD = {
    "held": [[[1, 2], [3, 4]], [[1], [2]]],
    "transient": [[1, 2], [3, 4]],
    "seconds": [[0.1, 0.2], [0.3, 0.4]],
    "base": 0,
    "floor": 0,
    "fixed_seconds": 0.0,
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seconds": [[0.1]]}, ValueError, r"`held` \(of 2 units\), `transient` \(of 2\) and `seconds` \(of 1\) must"),
        ({"transient": [[], [1, 2]]}, ValueError, r"`transient\[0\]` \(of shape \(0,\)\) must be a list of one choice"),
        ({"transient": [5, [1, 2]]}, ValueError, r"`transient\[0\]` \(of shape \(\)\) must be a list of one choice"),
        ({"transient": [[1], [1, 2]]}, ValueError, r"`held\[0\]` \(of shape \(2, 2\)\) must be of shape \(1, 2\)"),
        (
            {"held": [[[1, 2], [3, 4]], [1, 2]]},
            ValueError,
            r"`held\[1\]` \(of shape \(2,\)\) must be of shape \(2, 1\)",
        ),
        ({"seconds": [[0.1], [0.1, 0.2]]}, ValueError, r"`seconds\[0\]` \(of shape \(1,\)\) must be of shape \(2,\)"),
        ({"transient": [[1, -2], [3, 4]]}, ValueError, r"`transient\[0\]` \(=-2\) must not be negative"),
        ({"transient": [[1.0, 2.0], [3, 4]]}, TypeError, r"`transient\[0\]` \(of type float64\) must be bytes, as int"),
        (
            {"transient": [[1, 2**63 - 1], [3, 4]]},
            ValueError,
            r"`transient\[0\]` \(=9223372036854775807\) must be below",
        ),
        (
            {"base": 2**52, "floor": 2**52},
            ValueError,
            r"all bytes \(=9007199254741004 together, at most\) must be below",
        ),
        ({"base": True}, TypeError, r"`base` \(of type bool\) must be bytes, as integers"),
        ({"seconds": [[0.1, float("nan")], [1, 2]]}, ValueError, r"`seconds\[0\]` \(=\[0.1, nan\]\) must be seconds"),
        ({"seconds": [[0.1, float("inf")], [1, 2]]}, ValueError, r"`seconds\[0\]` \(=\[0.1, inf\]\) must be seconds"),
        ({"fixed_seconds": -1.0}, ValueError, r"`fixed_seconds` \(=-1.0\) must be seconds: finite, not negative"),
    ],
)
def test_rejects_wrong_costs(changes, error, message):
    with pytest.raises(error, match=message):
        ChainCosts(**(GOOD | changes))


def test_rejects_wrong_choices():
    costs = ChainCosts(**GOOD)
    with pytest.raises(ValueError, match=r"`choices` \(of length 1\) must be one for each of 2 units"):
        costs.peak([0])
    for choice in (-1, 2):
        with pytest.raises(ValueError, match=rf"`choices\[1\]` \(={choice}\) must be from 0 to 1"):
            costs.time([0, choice])
    with pytest.raises(ValueError, match=r"`max_points` \(=1\) must be 2 or more"):
        find_frontier(costs, max_points=1)
