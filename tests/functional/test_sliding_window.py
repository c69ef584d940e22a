"""`sliding_window_inference`: our loop, and MONAI's function where MONAI is installed."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet.functional import _sliding_window, sliding_window_inference
from revnet.functional._sliding_window import _device_of, _find_monai, _windows
from revnet.models import UNet3d

EPS = torch.finfo(torch.float32).eps
CASES = [  # the shape of the input, the sides of a patch, the overlap, the weights and the batch size
    ((1, 1, 20, 24, 28), (8, 8, 16), 0.25, "gaussian", 1),
    ((2, 3, 20, 9, 33), 8, 0.5, "constant", 3),
    ((2, 1, 5, 40, 8), 16, 0.7, "gaussian", 5),  # two sides are smaller than a patch
    ((1, 2, 31, 17), (8, 32), 0.0, "constant", 2),
    ((3, 2, 31, 17), 16, 0.6, "gaussian", 4),
    ((1, 2, 50), 7, 0.9, "gaussian", 2),
    ((1, 1, 4, 4, 4, 4), 3, 0.3, "constant", 4),
    ((1, 1, 6, 6), 200, 0.25, "gaussian", 1),  # the corners of the patch have the smallest weight
]


@pytest.fixture
def own_loop(monkeypatch):
    monkeypatch.setattr(_sliding_window, "_find_monai", lambda: None)


def convolution(num_dims, num_channels):
    """Return a network that sees its neighbors, with two channels of output."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_dims - 1]
    return nn.Sequential(kind(num_channels, 4, 3, padding=1), nn.Tanh(), kind(4, 2, 3, padding=1))


def by_hand(model, x, sides, overlap, weights):
    """Return the average as a sum over positions, in float64."""
    sides = (sides,) * (x.dim() - 2) if isinstance(sides, int) else sides
    missing = [max(side - size, 0) for side, size in zip(sides, x.shape[2:], strict=True)]
    padding = [count for m in reversed(missing) for count in (m // 2, m - m // 2)]
    padded = F.pad(x, padding)
    weight = torch.ones(sides, dtype=torch.float64)
    if weights == "gaussian":
        for position in itertools.product(*map(range, sides)):
            distances = [(p - (side - 1) / 2) / (side / 8) for p, side in zip(position, sides, strict=True)]
            weight[position] = max(math.exp(-sum(d * d for d in distances) / 2), 1e-3)
    starts = []
    for size, side in zip(padded.shape[2:], sides, strict=True):
        step = max(int(side * (1 - overlap)), 1)
        starts.append(sorted({min(start, size - side) for start in range(0, size + step, step)}))
    sums, total = 0, torch.zeros(padded.shape[2:], dtype=torch.float64)
    for corner in itertools.product(*starts):
        window = tuple(slice(start, start + side) for start, side in zip(corner, sides, strict=True))
        y = model(padded[(slice(None), slice(None), *window)]).double() * weight
        if isinstance(sums, int):
            sums = y.new_zeros((len(x), y.shape[1], *padded.shape[2:]))
        sums[(slice(None), slice(None), *window)] += y
        total[window] += weight
    inside = tuple(slice(m // 2, m // 2 + size) for m, size in zip(missing, x.shape[2:], strict=True))
    return (sums / total)[(slice(None), slice(None), *inside)]


@pytest.mark.usefixtures("own_loop")
@pytest.mark.parametrize(("shape", "sides", "overlap", "weights", "batch_size"), CASES[:6:2] + CASES[4:5])
def test_equals_the_definition(shape, sides, overlap, weights, batch_size):
    model, x = convolution(len(shape) - 2, shape[1]).double(), torch.randn(shape, dtype=torch.float64)
    y = sliding_window_inference(model, x, sides, overlap=overlap, weights=weights, batch_size=batch_size)
    expected = by_hand(model, x, sides, overlap, weights).detach()
    assert y.shape == expected.shape == (shape[0], 2, *shape[2:])
    assert y.dtype == torch.float64
    # The weights are float32: a relative error of some roundings of the exponent, and an average of values up to 2.
    assert (y - expected).abs().max() <= 100 * EPS


@pytest.mark.parametrize(("shape", "sides", "overlap", "weights", "batch_size"), CASES)
def test_pointwise_model_gives_the_whole_output(shape, sides, overlap, weights, batch_size):
    def model(x):
        return torch.cat([x, 2 * x.square() - 1], 1)

    x, options = torch.randn(shape), {"overlap": overlap, "weights": weights, "batch_size": batch_size}
    y, expected = sliding_window_inference(model, x, sides, **options), model(x)
    # Each patch adds two roundings, and the division one.
    patches = math.prod(math.ceil(1 / (1 - overlap)) + 1 for _ in shape[2:])
    assert ((y - expected).abs() <= (2 * patches + 1) * EPS * expected.abs()).all()
    if weights == "constant":  # sums of equal integers are exact, and so is their quotient
        x = x.mul(100).round()
        assert torch.equal(sliding_window_inference(model, x, sides, **options), model(x))


@pytest.mark.usefixtures("own_loop")
def test_one_patch_is_the_whole_input():
    model, x = UNet3d(in_channels=1, num_classes=2, widths=(4, 8)), torch.randn(2, 1, 8, 12, 16)
    y = sliding_window_inference(model, x, (8, 12, 16), weights="constant", batch_size=2)
    assert torch.equal(y, model(x))
    assert not y.requires_grad


@pytest.mark.usefixtures("own_loop")
def test_batches_of_patches_give_the_same_output():
    x = torch.randn(2, 1, 9, 9)
    results = []
    for batch_size in (1, 3, 100):
        sizes = []

        def model(patches, sizes=sizes):
            sizes.append(len(patches))
            return patches.cumsum(-1)

        results.append(sliding_window_inference(model, x, 4, overlap=0.5, batch_size=batch_size))
        num_patches = 2 * 4**2
        assert sizes == [min(batch_size, num_patches - start) for start in range(0, num_patches, batch_size)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", range(4, 14))
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.74, 0.99])
def test_windows_cover_the_input(size, overlap):
    starts = [window[0].start for window in _windows((size,), (4,), overlap)]
    assert starts == sorted(set(starts))
    assert (starts[0], starts[-1]) == (0, size - 4)
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(step <= max(int(4 * (1 - overlap)), 1) for step in steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_model_gets_the_dtype_of_the_input_and_sums_are_wide(dtype):
    x, seen = torch.randn(1, 1, 8, 8).to(dtype), set()

    def model(patches):
        seen.add(patches.dtype)
        return patches

    y = sliding_window_inference(model, x, 4, overlap=0.5, weights="constant")
    assert seen == {dtype}
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(y.to(dtype), x)  # one, two or four equal numbers: exact


def test_input_is_not_changed_by_a_model_that_returns_it():
    x = torch.randn(1, 1, 8, 8)
    before = x.clone()
    y = sliding_window_inference(nn.Identity(), x, 8)
    assert torch.equal(x, before)
    assert ((y - x).abs() <= 3 * EPS * x.abs()).all()


def test_padding_has_its_value():
    y = sliding_window_inference(
        lambda x: x.sum(-1, keepdim=True).expand_as(x), torch.ones(1, 1, 2), 5, padding_value=7
    )
    assert torch.equal(y, torch.full((1, 1, 2), 23.0))
    assert y.is_contiguous()


def test_patches_go_to_the_device_of_the_model():
    x = torch.ones(1)
    assert _device_of(nn.Conv2d(1, 1, 1, device="meta"), x).type == "meta"
    assert _device_of(nn.BatchNorm2d(1, affine=False, device="meta"), x).type == "meta"
    assert _device_of(nn.Identity(), x) == _device_of(torch.tanh, x) == x.device


@pytest.mark.gpu
def test_output_may_stay_in_host_memory():
    model, x = convolution(2, 1), torch.randn(1, 1, 64, 64)
    expected = sliding_window_inference(model, x, 16, overlap=0.5)
    y = sliding_window_inference(model.cuda(), x, 16, overlap=0.5)
    assert y.device.type == "cpu"
    assert (y - expected).abs().max() <= 1e-3
    on_device = sliding_window_inference(model, x, 16, overlap=0.5, output_device="cuda")
    assert (on_device.cpu() - y).abs().max() <= 100 * EPS


WRONG = [
    ({"model": 3}, TypeError, r"`model` \(=3\) must be a module or a function from patches to outputs"),
    ({"x": torch.ones(2, 2)}, ValueError, r"`x` \(of shape \(2, 2\)\) must be \(B, C, ...\) .* pass `x\[None, None\]`"),
    ({"x": torch.ones(1, 0, 2)}, ValueError, r"`x` \(of shape \(1, 0, 2\)\) must be .* not empty"),
    ({"x": torch.ones(1, 1, 8, 8).short()}, TypeError, r"`x` has dtype torch.int16, .* pass `x.float\(\)`"),
    (
        {"patch_size": (4, 4, 4)},
        ValueError,
        r"`patch_size` \(=\(4, 4, 4\)\) must be one integer, or one for each of the 2",
    ),
    ({"patch_size": (4, -1)}, ValueError, r"`patch_size` \(=-1\) must be a positive integer"),
    ({"patch_size": 2**31 - 1}, ValueError, r"`patch_size` \(=2147483647\) is too large: .* padded to more than"),
    ({"overlap": 1.0}, ValueError, r"`overlap` \(=1.0\) must be a number from 0 to below 1"),
    ({"weights": "linear"}, ValueError, r"`weights` \(='linear'\) must be 'constant' or 'gaussian'"),
    ({"batch_size": 0}, ValueError, r"`batch_size` \(=0\) must be a positive integer"),
    ({"padding_value": math.nan}, ValueError, r"`padding_value` \(=nan\) must be a finite number"),
    ({"device": 3}, TypeError, r"`device` \(=3\) must be a device of PyTorch, such as 'cpu' or 'cuda'"),
    ({"output_device": "gpu"}, ValueError, r"`output_device` \(='gpu'\) must be a device that PyTorch can use here"),
    ({"model": lambda x: {"out": x}}, TypeError, r"`model` returned \{'out'.*must return a floating-point tensor"),
    (
        {"model": lambda x: x.argmax(1, keepdim=True)},
        TypeError,
        r"returned a tensor of dtype torch.int64, .* take labels",
    ),
    (
        {"model": lambda x: x[..., ::2]},
        ValueError,
        r"`model` returned shape \(1, 1, 4, 2\) for patches of shape \(1, 1,",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_rejects_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sliding_window_inference(**{"model": nn.Identity(), "x": torch.ones(1, 1, 8, 8), "patch_size": 4, **arguments})


def test_a_broken_monai_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "monai").mkdir()
    (tmp_path / "monai" / "__init__.py").write_text("import no_such_package_of_monai")
    for name in [name for name in sys.modules if name.partition(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert _find_monai() is None


@pytest.fixture
def monai():
    function = _find_monai()
    if function is None:
        pytest.skip("MONAI is not installed")
    return function


@pytest.mark.parametrize(("shape", "sides", "overlap", "weights", "batch_size"), CASES)
def test_equals_monai_to_the_last_bit(monai, monkeypatch, shape, sides, overlap, weights, batch_size):
    def model(x):
        return torch.cat([x.cumsum(-1).sin(), x], 1)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        options = {"overlap": overlap, "weights": weights, "batch_size": batch_size}
        with_monai = sliding_window_inference(model, x, sides, **options)
        with monkeypatch.context() as patch:
            patch.setattr(_sliding_window, "_find_monai", lambda: None)
            assert torch.equal(sliding_window_inference(model, x, sides, **options), with_monai)
        if dtype != torch.bfloat16:  # MONAI itself adds in the dtype of its input
            plain = monai(x, sides, batch_size, model, overlap=overlap, mode=weights)
            assert torch.equal(plain, with_monai)
