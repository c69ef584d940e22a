import copy
import math
import pickle

import pytest
import torch
from torch import nn

from revnet import FixedPoint, ReconstructionError, ReversibleBlock, ReversibleSequential, Store, set_coupling
from revnet.coupling import BDIA, ExactScaled, Scaled
from revnet.engine import Chain, HalfBlock, inverse


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def half_of_limit(coupling, dtype, *shape):
    return (torch.rand(shape, dtype=dtype) * 2 - 1) * coupling.limit(dtype) / 2


@pytest.mark.parametrize(
    "coupling", [FixedPoint(), FixedPoint(1), FixedPoint(22), FixedPoint(40, is_wide=True)], ids=repr
)
@pytest.mark.parametrize("in_place", [False, True])
def test_inverse_undoes_forward_to_the_last_bit(coupling, in_place):
    dtype = torch.float64 if coupling.is_wide else torch.float32
    x = coupling.prepare(half_of_limit(coupling, dtype, 10_000))
    residual = half_of_limit(coupling, dtype, 10_000)
    x[:4], residual[:4] = 0, torch.tensor([-0.0, 1e-9, -1e-9, 0.0])
    y = coupling.forward(x, residual)
    before = y.clone()
    back = coupling.inverse(y, residual, in_place=in_place)
    assert torch.equal(bits(back), bits(x))
    assert (back.data_ptr() == y.data_ptr()) == in_place
    assert in_place or torch.equal(y, before)
    assert (y * 2**coupling.fraction_bits).frac().abs().max() == 0
    assert (before - x - residual).abs().max() <= 2.0 ** -(coupling.fraction_bits + 1)


def test_prepare_rounds_to_the_grid_without_negative_zeros():
    x = FixedPoint(2).prepare(torch.tensor([0.3, -0.3, 0.125, 0.375, -0.0, -0.1, 5.0]))
    assert bits(x).equal(bits(torch.tensor([0.25, -0.25, 0.0, 0.5, 0.0, 0.0, 5.0])))


@pytest.mark.parametrize(
    ("dtype", "coupling", "stream"),
    [
        (torch.float16, FixedPoint(), torch.float32),
        (torch.bfloat16, FixedPoint(), torch.float32),
        (torch.float32, FixedPoint(), torch.float32),
        (torch.float64, FixedPoint(), torch.float64),
        (torch.bfloat16, FixedPoint(is_wide=True), torch.float64),
    ],
)
def test_dtype_of_streams(dtype, coupling, stream):
    assert coupling.prepare(torch.ones(2, dtype=dtype)).dtype == stream
    assert coupling.limit(stream) == 2 ** ((24 if stream == torch.float32 else 53) - 14)


def test_gradients_pass_through_unchanged():
    coupling = FixedPoint(3)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(5, requires_grad=True)
    y = coupling.forward(coupling.prepare(x), residual)
    weights = torch.randn(5, dtype=torch.float64)
    (weights * y).sum().backward()
    assert torch.equal(x.grad, weights)
    assert torch.equal(residual.grad, weights.float())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # From PyTorch itself.
def test_works_under_transforms():
    coupling = FixedPoint(30, is_wide=True)
    x, residual = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def joined(x, residual):
        return coupling.forward(coupling.prepare(x), residual)

    expected = joined(x, residual)
    assert torch.equal(torch.func.vmap(joined)(x, residual), expected)
    y, tangent = torch.func.jvp(joined, (x, residual), (torch.ones_like(x), 2 * torch.ones_like(x)))
    assert torch.equal(y, expected)
    assert torch.equal(tangent, 3 * torch.ones_like(x))
    _, tangent = torch.func.jvp(coupling.inverse, (y, residual), (torch.ones_like(x), 2 * torch.ones_like(x)))
    assert torch.equal(tangent, -torch.ones_like(x))
    grad = torch.func.grad(lambda x: joined(x, residual).square().sum())(x)
    assert torch.equal(grad, 2 * expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"`fraction_bits` \(=0\) must be from 1 to 22, so that a float32 stream has bits left"),
        ((23,), r"`fraction_bits` \(=23\) must be from 1 to 22"),
        ((52, True), r"`fraction_bits` \(=52\) must be from 1 to 51, so that a float64 stream"),
        ((14.0,), r"`fraction_bits` \(=14.0\) must be an integer"),
        ((True,), r"`fraction_bits` \(=True\) must be an integer"),
    ],
)
def test_rejects_a_wrong_grid(arguments, message):
    with pytest.raises(ValueError, match=message):
        FixedPoint(*arguments)


def test_rejects_other_streams():
    with pytest.raises(
        TypeError, match=r"`x` has dtype torch.complex64, but FixedPoint\(.*needs real streams; use `Add"
    ):
        FixedPoint().prepare(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(
        TypeError, match=r"needs a stream of float32 or float64, which `prepare` makes, but this is torch.bf"
    ):
        FixedPoint().limit(torch.bfloat16)


@pytest.mark.parametrize("coupling", [FixedPoint(), ExactScaled(Scaled(0.5)), BDIA()], ids=repr)
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.filterwarnings("ignore:the streams that begin")
def test_rejects_streams_of_two_dtypes_if_it_changes_them(coupling, dtypes):
    """The output has the dtype of the input, which must be one."""
    block = ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3), coupling=coupling)
    first, second = (getattr(torch, dtype) for dtype in dtypes)
    x = (torch.ones(2, 3, dtype=first), torch.ones(2, 3, dtype=second))
    with pytest.raises(
        TypeError, match=rf"`x2` has dtype {second}, but `x1` has {first}, .* convert the streams to one"
    ):
        block(x)


def test_equal_couplings_compare_equal():
    assert FixedPoint(12) == FixedPoint(12) != FixedPoint(13)
    assert pickle.loads(pickle.dumps(FixedPoint(12, is_wide=True))) == FixedPoint(12, is_wide=True)
    assert copy.deepcopy(FixedPoint(12)) == FixedPoint(12)


class Returning(nn.Module):
    """Returns one number everywhere. The number is a parameter, so that there is something to train."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x):
        return self.value.to(x.dtype).expand_as(x)


def sequence_that_reaches(value, coupling):
    blocks = [ReversibleBlock(Returning(1), Returning(1)) for _ in range(4)]
    blocks[2].g = Returning(value)
    sequence = ReversibleSequential(*blocks)
    set_coupling(sequence, coupling)
    return sequence


@pytest.mark.parametrize(
    ("value", "bits", "hint"),
    [
        (1100, 14, "set `fraction_bits=13` or less, set `is_wide=True`"),
        (5000, 14, "set `fraction_bits=11` or less, set `is_wide=True`"),
        (3e7, 14, "set `is_wide=True`"),
        (-7, 22, "set `fraction_bits=21` or less, set `is_wide=True`"),
    ],
)
def test_stream_out_of_range_raises_with_a_fitting_setting(value, bits, hint):
    sequence = sequence_that_reaches(value, FixedPoint(bits))
    with pytest.raises(ReconstructionError) as raised:
        sequence(torch.zeros(2, 4))
    assert "at `blocks.2.g`, beyond the " in str(raised.value)
    assert f"; {hint}, or normalize" in str(raised.value)
    if "fraction_bits=" in hint:
        fitting = int(hint.split("fraction_bits=")[1].split("`")[0])
        sequence_that_reaches(value, FixedPoint(fitting))(torch.zeros(2, 4)).sum().backward()
        with pytest.raises(ReconstructionError):
            sequence_that_reaches(value, FixedPoint(fitting + 1))(torch.zeros(2, 4))
    sequence_that_reaches(value, FixedPoint(bits, is_wide=True))(torch.zeros(2, 4)).sum().backward()


def test_does_not_check_the_range_without_reversal():
    sequence = sequence_that_reaches(1100, FixedPoint())
    with torch.no_grad():
        sequence(torch.zeros(2, 4))
    sequence.set_policies(Store())
    sequence(torch.zeros(2, 4)).sum().backward()


def test_inverse_checks_the_range():
    chain = Chain([HalfBlock(Returning(1), 0, 1, "f", FixedPoint())]).bind()
    with pytest.raises(ReconstructionError, match="a stream reached 2,000 at `f`, beyond the 1,024 up to which"):
        inverse(chain, (torch.full((2,), 2000.0), torch.zeros(2)))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_ignores_nonfinite_values(value):
    sequence = sequence_that_reaches(value, FixedPoint())
    y = sequence(torch.zeros(2, 4))
    assert not y.isfinite().all()
    y.sum().backward()
