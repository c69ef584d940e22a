"""The largest side fits the budget, and the next one does not: both by `predict`."""

import pytest
import torch
from torch import nn

from revnet import PredictionError
from revnet.memory import max_batch_size, max_patch_size, predict
from revnet.memory.planning import _max_patch_size
from revnet.models import IRevNet, ReversibleTransformer, UNet3d

TINY = {"in_channels": 1, "num_classes": 2, "widths": (4, 8)}


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


class Pointwise(nn.Module):
    """One value for each position, which may depend on a second input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.sides = []

    def forward(self, x, mask=None, code=None):
        self.sides.append(tuple(x.shape))
        y = x * self.weight
        y = y if mask is None else y * mask
        return y if code is None else y + code.sum()


@pytest.fixture
def sides_tried(monkeypatch):
    """The sides that a search predicts, in order."""
    tried = []
    with_side = _max_patch_size._with_side

    def spy(step, first, dims, side):
        tried.append(side)
        return with_side(step, first, dims, side)

    monkeypatch.setattr(_max_patch_size, "_with_side", spy)
    return tried


@pytest.mark.parametrize(
    ("budget", "start"), [pytest.param(200_000, 2, marks=pytest.mark.slow), (20_000_000, 2), (3_000_000, 32)]
)
def test_volume_is_the_largest_that_fits(budget, start, sides_tried):
    model = UNet3d(**TINY)
    side = max_patch_size(model, on_meta(1, 1, start, start, start), budget=budget, optimizer=torch.optim.Adam)

    def peak(side):
        return predict(model, on_meta(1, 1, side, side, side), optimizer=torch.optim.Adam).peak_bytes

    assert side % 2 == 0
    assert side == 0 or peak(side) <= budget
    assert peak(side + 2) > budget
    assert len(sides_tried) == len(set(sides_tried)) <= 10
    assert all(tried % model.size_multiple == 0 for tried in sides_tried)


def test_multiple_and_fixed_dimensions():
    model = UNet3d(**TINY)
    side = max_patch_size(model, on_meta(2, 1, 4, 8, 8), budget="3MB", dims=(-2, -1), multiple=6)

    def peak(side):
        return predict(model, on_meta(2, 1, 4, side, side)).peak_bytes

    assert side % 6 == 0
    assert peak(side) <= 3_000_000 < peak(side + 6)


def test_longest_sequence():
    model = ReversibleTransformer(vocab_size=10, dim=8, depth=1, num_heads=2, max_length=10_000)
    length = max_patch_size(model, on_meta(2, 8, dtype=torch.int64), budget="1MB", dims=[1])
    peaks = [predict(model, on_meta(2, n, dtype=torch.int64)).peak_bytes for n in (length, length + 1)]
    assert peaks[0] <= 1_000_000 < peaks[1]


def test_peak_that_grows_in_steps_is_searched_fast(sides_tried):
    class Padded(Pointwise):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (0, -x.shape[-1] % 512)))

    length = max_patch_size(Padded(), on_meta(1, 1, 3), budget="1MB")
    peaks = [predict(Padded(), on_meta(1, 1, n)).peak_bytes for n in (length, length + 1)]
    assert peaks[0] <= 1_000_000 < peaks[1]
    assert len(sides_tried) <= 30


def test_tensors_with_the_same_sides_change_too():
    x, mask, code = on_meta(1, 3, 8, 8), on_meta(1, 8, 8), on_meta(1, 8)
    model = Pointwise()
    side = max_patch_size(model, x, mask, budget="1MB", kwargs={"code": code})
    peaks = [
        predict(model, on_meta(1, 3, s, s), on_meta(1, s, s), kwargs={"code": code}).peak_bytes
        for s in (side, side + 1)
    ]
    assert peaks[0] <= 1_000_000 < peaks[1]
    assert all(shape[2] == shape[3] for shape in model.sides)


def test_nothing_fits():
    assert max_patch_size(UNet3d(**TINY), on_meta(1, 1, 8, 8, 8), budget=10_000) == 0


def test_sides_beyond_64_bits_do_not_fit(sides_tried):
    assert max_patch_size(Pointwise(), on_meta(1, 1, 8, 8), budget="1GiB", multiple=2**31 - 1) == 0
    assert len(sides_tried) == 1
    assert max_patch_size(UNet3d(**TINY), on_meta(1, 1, 8, 8, 8), budget="1GiB", multiple=10**6) == 0
    x = on_meta(1, 1, 2**29, 2**29)  # twice as large overflows
    assert 2**10 < max_patch_size(Pointwise(), x, budget="1GiB") < 2**15


def test_sides_that_are_too_small_for_the_model_do_not_fit():
    class NeedsFive(nn.Conv2d):
        def forward(self, x):
            if x.shape[-1] < 5:
                raise ValueError("too small")
            return super().forward(x)

    model = NeedsFive(1, 1, 1)
    least = predict(model, on_meta(1, 1, 5, 5)).peak_bytes
    assert max_patch_size(model, on_meta(1, 1, 40, 40), budget=least) == 5
    assert max_patch_size(model, on_meta(1, 1, 40, 40), budget=least - 1) == 0


def test_model_that_fails_on_larger_sides_says_where():
    model = ReversibleTransformer(vocab_size=10, dim=8, depth=1, num_heads=2, max_length=32)
    with pytest.raises(PredictionError, match=r"works with sides up to 16, but fails with sides of 96; .*`max_length`"):
        max_patch_size(model, on_meta(1, 8, dtype=torch.int64), budget="1GiB", dims=(1,), multiple=4 * 2)
    model = UNet3d(**TINY)
    with pytest.raises(PredictionError, match=r"fails with sides of 9; `multiple` sets the steps.*multiples of 2"):
        max_patch_size(model, on_meta(1, 1, 10, 10, 10), budget="1GiB", multiple=3)
    with pytest.raises(PredictionError, match=r"^the forward pass of UNet3d failed, .*multiples of 2"):
        max_patch_size(model, on_meta(1, 1, 9, 9, 9), budget="1GiB", multiple=1)


def test_multiple_comes_from_the_model(sides_tried):
    model = IRevNet(num_blocks=(1, 1), strides=(1, 2), num_classes=2)
    assert max_patch_size(model, on_meta(1, 3, 10, 10), budget="1MB") % 4 == 0
    assert all(side % 4 == 0 for side in sides_tried)


def test_model_is_left_unchanged():
    model = UNet3d(**TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    max_patch_size(model, torch.zeros(1, 1, 8, 8, 8), budget="1MB")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "much"}, ValueError, "`budget`"),
        ({"multiple": 0}, ValueError, r"`multiple` \(=0\) must be a positive integer; 16 suits"),
        ({"dims": 2}, TypeError, r"`dims` \(=2\) must be dimensions of the inputs, such as \(2, 3, 4\)"),
        ({"dims": ()}, TypeError, r"`dims` \(=\(\)\) must be dimensions"),
        ({"dims": (4,)}, ValueError, r"`dims` \(=\(4,\)\) must be dimensions of an input, but no input has 5"),
        ({"dims": (1, -3)}, ValueError, r"`dims` \(=\(1, -3\)\) must be different dimensions"),
    ],
)
def test_rejects_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        max_patch_size(Pointwise(), on_meta(1, 1, 8, 8), **{"budget": "1MB", **options})
    with pytest.raises(ValueError, match=r"`dims` \(=None\), .* pass `dims=\(1,\)` for sequences"):
        max_patch_size(Pointwise(), on_meta(1, 8), budget="1MB")


def test_nothing_fits_as_in_the_search_for_a_batch():
    arguments = UNet3d(**TINY), on_meta(1, 1, 8, 8, 8)
    assert max_batch_size(*arguments, budget=1000) == max_patch_size(*arguments, budget=1000) == 0
