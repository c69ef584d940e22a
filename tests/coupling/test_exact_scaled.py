import copy
import math

import pytest
import torch
from torch import nn

from revnet import Checkpoint, FixedPoint, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.coupling import ExactScaled, Scaled
from revnet.errors import ReconstructionError
from revnet.memory import measure, predict
from tests.helpers import mlp, squares

FACTORS = [0.5, -0.5, 0.7, -0.7, 0.9, 0.25, -0.25, 0.1, 1 / 64, 1.0, -1.0, 1.1]


def stack(coupling, depth, *, dim=4, scale=1.0, dropout=0.0):
    def function():
        layers = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout), nn.Linear(dim, dim))
        with torch.no_grad():
            layers[-1].weight.mul_(scale)
        return layers

    return ReversibleSequential(*[ReversibleBlock(function(), function(), coupling=coupling) for _ in range(depth)])


def outcome(sequence, x, policy, autocast=False):
    set_policy(sequence, policy)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = sequence(x)
    return [y, *torch.autograd.grad(squares(y), [x, *sequence.parameters()])]


def assert_same_bits(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("a", FACTORS)
@pytest.mark.parametrize("is_wide", [False, True], ids=["float32", "float64"])
def test_every_integer_is_restored(a, is_wide):
    coupling = ExactScaled(Scaled(a), 4, is_wide=is_wide)
    steps = torch.arange(-5000, 5001, dtype=torch.float64 if is_wide else torch.float32)
    x, residual = steps / 16, torch.randn(len(steps)) * 10
    y, kept = coupling.forward_keeping(x, residual)
    assert torch.equal(coupling.inverse_kept(y, residual, kept), x)
    assert torch.equal(coupling.forward(x, residual), y)
    assert (y - (coupling.a * x + residual)).abs().max() <= 1 / 16 + 1e-5  # half a step for each of two roundings
    assert coupling.inverse_kept(y, residual, kept, in_place=True) is y
    assert torch.equal(y, x)


@pytest.mark.parametrize("num_parts", [1, 3, 16, 32, 64, 100, 128, 179, 255, 256, 300, 512, 1023])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("is_wide", "num_bits"), [(False, 24), (True, 53)], ids=["float32", "float64"])
def test_products_equal_those_of_python_integers(num_parts, sign, is_wide, num_bits):
    coupling = ExactScaled(Scaled(sign * num_parts / 256), 4, is_wide=is_wide)
    ends = [2**num_bits - distance for distance in range(1, 300)]
    integers = [*range(-300, 300), *ends, *[-end for end in ends]]
    products = [sign * ((num_parts * k + 128) >> 8) for k in integers]
    dtype = torch.float64 if is_wide else torch.float32
    x = torch.tensor(integers, dtype=torch.float64).to(dtype) / 16
    # Adding half of the same product keeps the sum in range for every factor. The others end near a limit, from
    # residuals of up to five times the limit.
    halves, end = [-(product // 2) for product in products], 2**num_bits - 99
    for residuals in (halves, [end - product for product in products], [-end - product for product in products]):
        residual = torch.tensor(residuals, dtype=torch.float64).to(dtype) / 16
        rounded = (residual.double() * 16).long().tolist()  # Beyond the range, the dtype has rounded them.
        expected = [product + step for product, step in zip(products, rounded, strict=True)]
        y, kept = coupling.forward_keeping(x, residual)
        inside = torch.tensor([abs(step) < 2**num_bits for step in expected])
        assert inside.sum() >= 600
        assert torch.equal((y.double() * 16)[inside], torch.tensor(expected, dtype=torch.float64)[inside])
        assert torch.equal(coupling.inverse_kept(y, residual, kept)[inside], x[inside])


@pytest.mark.parametrize("a", [0.5, -0.5, 0.7, -0.7, -1.0])
def test_a_zero_has_no_sign(a):
    coupling = ExactScaled(Scaled(a))
    x, residual = torch.zeros(3), torch.tensor([0.0, -0.0, -(2.0**-20)])
    y, kept = coupling.forward_keeping(x, residual)
    for zero in (y, coupling.inverse_kept(y, residual, kept)):
        assert torch.equal(zero, x)
        assert not zero.signbit().any()


# PyTorch raises this warning itself when it traces any custom `autograd.Function`.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_factor_of_one_is_the_fixed_point_coupling():
    sequence, twin = (stack(coupling, 3) for coupling in (ExactScaled(Scaled()), FixedPoint()))
    twin.load_state_dict(sequence.state_dict())
    x = torch.randn(5, 8, requires_grad=True)
    assert_same_bits(outcome(sequence, x, Reverse()), outcome(twin, x, Reverse()))
    compiled = torch.compile(copy.deepcopy(sequence), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), sequence(x))


@pytest.mark.parametrize("a", [0.5, -0.5, 0.7, 0.9, 0.25, 0.1])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_gradients_have_the_same_bits(a, autocast):
    sequence = stack(ExactScaled(Scaled(a, 1.0, 1 - a)), 12, scale=0.1, dropout=0.1)
    x = torch.randn(5, 8, requires_grad=True)
    expected = outcome(sequence, x, Store(), autocast)
    for policy in (Reverse(), Reverse(hold="g"), Checkpoint()):
        assert_same_bits(outcome(sequence, x, policy, autocast), expected)


@pytest.mark.slow
@pytest.mark.parametrize("a", [0.5, -0.5, 0.7, -0.7, 0.9, -0.9, 0.25, -0.25, 0.1, -0.1])
def test_gradients_have_the_same_bits_at_1000_functions(a):
    sequence = stack(ExactScaled(Scaled(a, 1.0, 1 - a if a > 0 else 0.0)), 500, scale=0.01, dropout=0.1)
    x = torch.randn(5, 8, requires_grad=True)
    assert_same_bits(outcome(sequence, x, Reverse()), outcome(sequence, x, Store()))


@pytest.mark.parametrize(("a", "num_bits"), [(1.0, 0), (0.5, 1), (0.7, 1), (0.25, 2), (0.1, 4), (1 / 64, 8)])
def test_bytes_of_the_kept_bits(a, num_bits):
    coupling = ExactScaled(Scaled(a, 0.1, 0.0))
    assert coupling.num_bits == num_bits
    x = torch.randn(64, 8, requires_grad=True)

    def held_bytes(depth):
        sequence = stack(coupling, depth)
        set_policy(sequence, Reverse())
        counted = measure(sequence, x)
        assert counted.peak_bytes == predict(sequence, x).peak_bytes
        return counted.held_bytes

    num_elements = 64 * 4
    assert held_bytes(8) - held_bytes(4) == 8 * num_elements * num_bits // 8


def test_a_retained_graph_and_two_passes():
    sequence = stack(ExactScaled(Scaled.consistent(0.5)), 3, scale=0.1)
    twin = copy.deepcopy(sequence)
    set_policy(twin, Store())
    x, z = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    results = []
    for module in (sequence, twin):
        first, second = squares(module(x)), squares(module(z))
        inputs = [x, *module.parameters()]
        again = [torch.autograd.grad(first, inputs, retain_graph=True) for _ in range(2)]
        (gradient,) = torch.autograd.grad(second, z, create_graph=True)
        results.append([*again[0], *again[1], gradient, *torch.autograd.grad(squares(gradient), [z])])
    assert_same_bits(*results)


def test_stays_exact_where_the_inverse_would_explode():
    """In floating point, 24 divisions by 0.1 leave nothing of the stream."""
    sequence = stack(ExactScaled(Scaled(0.1, 1.0, 0.9)), 12, scale=0.1)
    x = torch.randn(5, 8, requires_grad=True)
    assert_same_bits(outcome(sequence, x, Reverse()), outcome(sequence, x, Store()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("a", [0.5, 0.7, 1.5])
@pytest.mark.parametrize("is_wide", [False, True], ids=["float32", "float64"])
def test_what_is_not_finite_stays_visible_and_alone(value, a, is_wide):
    coupling = ExactScaled(Scaled(a), is_wide=is_wide)
    good = coupling.prepare(torch.arange(16.0) / 3)
    bad = good.index_fill(0, torch.tensor([5]), value)
    finite = good.isfinite().index_fill(0, torch.tensor([5]), False)
    for x, residual in ((good, bad), (bad, good)):
        y, kept = coupling.forward_keeping(x, residual)
        back = coupling.inverse_kept(y, residual, kept)
        assert torch.equal(y.isfinite(), finite)
        assert torch.equal(back.isfinite(), finite)
        assert torch.equal(back[finite], good[finite])


@pytest.mark.parametrize("value", [1e12, -1e15, 1e19, 1e300, math.inf])
def test_products_beyond_the_integers_are_ordinary(value):
    """Outside of its range, nothing wraps, so that the error of a backward pass says how large a stream was."""
    coupling = ExactScaled(Scaled(0.7))
    x = torch.tensor([value, 1.0], dtype=torch.float64)
    y = coupling.forward(x, torch.zeros_like(x))
    assert torch.allclose(y, x * coupling.a, rtol=1e-12, atol=2.0**-14)


def test_a_stream_beyond_the_integers_is_reported_as_it_is():
    sequence = stack(ExactScaled(Scaled(0.7)), 1).double()
    x = torch.full((2, 8), 1e15, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        ReconstructionError, match=r"a stream reached 6\.\d+e\+14 at `blocks\.0\.f`, .*set `fraction_bits=3`"
    ):
        sequence(x).sum().backward()


class ShiftedTanh(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(float(number)))

    def forward(self, x):
        return torch.tanh(x) + self.number


@pytest.mark.parametrize("a", [0.5, 0.7])
def test_an_input_out_of_range_is_reported_even_if_a_residual_brings_it_back(a):
    """Its last bit is lost, and the function that reads it is not the reason."""
    block = ReversibleBlock(ShiftedTanh(0), ShiftedTanh(-500), coupling=ExactScaled(Scaled(a)))
    x = torch.tensor([[0.0, 1025.0]], requires_grad=True)
    with pytest.raises(ReconstructionError, match=r"a stream reached 1,025 at `blocks\.0\.g`, beyond the 1,024"):
        ReversibleSequential(block)(x)
    ReversibleSequential(block, policy=Store())(x).sum().backward()


def test_a_residual_above_the_limit_leaves_gradients_exact():
    """Only the streams have a limit, here of 4: a residual of 4.2 brings -0.3 times 3.5 to 3.2."""
    block = ReversibleBlock(ShiftedTanh(1), ShiftedTanh(5), coupling=ExactScaled(Scaled(0.3), 51, is_wide=True))
    x = torch.linspace(-3.6, -3.4, 128, dtype=torch.float64).view(8, 16).requires_grad_()
    sequence = ReversibleSequential(block).double()
    assert_same_bits(outcome(sequence, x, Reverse()), outcome(sequence, x, Store()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # PyTorch's own, at the first use of `jvp`
@pytest.mark.parametrize("factor", [0.5, -0.7, 1.25])
def test_forward_derivatives_and_vmap(factor):
    coupling = ExactScaled(Scaled(factor, 0.5, 0.25))
    x, residual, v, w = torch.randn(4, 3, 5).unbind()

    def run(x, residual):
        return coupling.forward(x, residual)

    _, tangent = torch.func.jvp(run, (x, residual), (v, w))
    assert torch.allclose(tangent, coupling.a * v + w)
    for dims in ((0, 0), (0, None), (None, 0)):
        given = [tensor if dim == 0 else tensor[0] for tensor, dim in zip((x, residual), dims, strict=True)]
        assert torch.equal(torch.vmap(run, dims)(*given), run(*torch.broadcast_tensors(*given)))
    if coupling.num_bits == 0:
        _, tangent = torch.func.jvp(coupling.inverse, (x, residual), (v, w))
        assert torch.allclose(tangent, (v - w) / coupling.a)


def test_the_inverse_needs_the_kept_bits():
    block = ReversibleBlock(mlp(3), mlp(3), coupling=ExactScaled(Scaled(0.5)))
    with pytest.raises(ValueError, match=r"the inverse of `g` needs the bits that .* keeps in the forward pass"):
        block.inverse(torch.zeros(4, 6))
    block = ReversibleBlock(mlp(3), mlp(3), coupling=ExactScaled(Scaled.midpoint()))
    x = torch.tensor([[1.0, 0.5, 0.25, 2.0, 0.0, -1.0]])
    assert torch.equal(block.inverse(block(x)), x)


@pytest.mark.parametrize("a", [1 / 1024, 4.0, -8.0])
def test_rejects_a_factor_that_is_out_of_range(a):
    with pytest.raises(ValueError, match=r"`a` of `scaled` .* must have a magnitude from 1/256 to below 4"):
        ExactScaled(Scaled(a))


def test_rejects_what_is_not_scaled():
    with pytest.raises(TypeError, match=r"`scaled` \(=0.5\) must be a `Scaled`"):
        ExactScaled(0.5)
    for value in (10**5000, torch.zeros(4, 8, 8)):
        with pytest.raises(TypeError, match=r"^`scaled` \(=.*\) must be a `Scaled`, such as [^\n]*$"):
            ExactScaled(value)
    with pytest.raises(ValueError, match="`fraction_bits`"):
        ExactScaled(Scaled(0.5), 30)
