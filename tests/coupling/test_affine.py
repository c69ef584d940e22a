import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.coupling import Affine
from tests.helpers import assert_close, gradients, scaling_mlp, squares


def stream(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("coupling", [Affine(), Affine(reach=0.5), Affine("sigmoid")], ids=str)
@pytest.mark.parametrize(("shape", "doubled"), [((3, 4), (3, 8)), ((2, 4, 3, 3), (2, 8, 3, 3)), ((2, 5, 4), (2, 5, 8))])
def test_inverse_undoes_forward(coupling, shape, doubled):
    x, residual = stream(*shape), 2 * stream(*doubled)
    y = coupling.forward(x, residual)
    assert_close(coupling.inverse(y, residual), x, tolerance=1e-9)
    before = y.clone()
    result = coupling.inverse(y, residual, in_place=True)
    assert result.data_ptr() == y.data_ptr()
    assert_close(result, coupling.inverse(before, residual), tolerance=1e-14)


def test_matches_the_paper():
    """Compare with equations 7 and 8 of Real NVP, with shift t and log-scale s."""
    x, t, raw = stream(3, 4), stream(3, 4), 5 * stream(3, 4)
    residual = torch.cat((t, raw), 1)
    s = 1.5 * torch.tanh(raw / 1.5)
    assert s.abs().max() <= 1.5
    assert_close(Affine(reach=1.5).forward(x, residual), x * s.exp() + t, tolerance=1e-14)
    assert_close(Affine(reach=1.5).log_det(x, residual), s.sum(1), tolerance=1e-14)
    assert_close(Affine("sigmoid").forward(x, residual), x * torch.sigmoid(raw + 2) + t, tolerance=1e-14)
    assert_close(Affine("sigmoid").log_det(x, residual), F.logsigmoid(raw + 2).sum(1), tolerance=1e-14)


def test_finds_the_doubled_dimension_of_empty_and_square_streams():
    for shape in ((0, 4), (4, 4), (1, 1)):
        x = stream(*shape)
        residual = stream(shape[0], 2 * shape[1])
        assert Affine().forward(x, residual).shape == shape
        assert Affine().log_det(x, residual).shape == shape[:1]


def test_accepts_a_low_precision_residual():
    x, residual = torch.randn(2, 3), torch.randn(2, 6).bfloat16()
    y = Affine().forward(x, residual)
    assert y.dtype is torch.float32
    assert Affine().log_det(x, residual).dtype is torch.float32
    assert_close(Affine().inverse(y, residual), x, tolerance=1e-5)  # Float32 rounding, with scales up to e^2.


def test_gradients_under_autocast_equal_the_stored_twin():
    sequence = ReversibleSequential(
        *[ReversibleBlock(scaling_mlp(4), scaling_mlp(4), coupling=Affine()) for _ in range(6)]
    )
    twin = ReversibleSequential(*sequence, policy=Store())
    x = torch.randn(5, 8)
    steps = []
    for module in (sequence, twin):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, log_det = module.forward_with_log_det(x)
        assert y.dtype == log_det.dtype == torch.float32
        (squares(y) + log_det.sum()).backward()
        steps.append(gradients(module))
    # Rebuilt streams carry float32 rounding errors, which sometimes change a bfloat16 rounding.
    assert_close(steps[0], steps[1], tolerance=2e-2)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.randn(3, 4), ValueError, r"`blocks\.0\.g` returned shape \(3, 4\), but must return a shift and a scale"),
        (torch.randn(6, 8), ValueError, r"with one dimension doubled"),
        (torch.randn(3, 8, 1), ValueError, r"with one dimension doubled"),
        (torch.randn(1, 8), ValueError, r"must return the shape of the stream"),
        (torch.randn(3, 8).double(), TypeError, r"`blocks\.0\.g` returned torch.float64, .*torch.float32"),
        (None, TypeError, r"`blocks\.0\.g` returned NoneType, but must return one tensor"),
        ((torch.randn(3, 4),) * 3, TypeError, "returned tuple of 3"),
    ],
)
def test_rejects_a_wrong_residual(residual, error, message):
    for method in (Affine().forward, Affine().inverse):
        with pytest.raises(error, match=message):
            method(torch.randn(3, 4), residual, "blocks.0.g")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": "relu"}, r"`bound` \(='relu'\) must be 'tanh' or 'sigmoid'"),
        ({"reach": 0}, r"`reach` \(=0\) must be a positive number"),
        ({"reach": True}, r"`reach` \(=True\)"),
        ({"reach": float("inf")}, r"`reach` \(=inf\)"),
    ],
)
def test_rejects_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Affine(**options)


def test_rejects_complex_streams():
    block = ReversibleBlock(scaling_mlp(2), scaling_mlp(2), coupling=Affine())
    with pytest.raises(TypeError, match=r"complex64, but Affine\(.*needs real streams"):
        block(torch.randn(3, 4, dtype=torch.complex64))


def test_equal_couplings_compare_equal():
    assert Affine() == Affine("tanh", 2.0) == pickle.loads(pickle.dumps(Affine()))
    assert Affine() != Affine("sigmoid")
    assert copy.deepcopy(Affine("sigmoid")) == Affine("sigmoid")


class LearnedFactor(nn.Module):
    """A residual function with a learned factor for each channel."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.Linear(dim, dim)
        self.log_factor = nn.Parameter(torch.randn(dim) / 4)

    def forward(self, x):
        return self.layer(x).tanh(), self.log_factor


def test_a_learned_factor_for_each_channel():
    blocks = [ReversibleBlock(LearnedFactor(3), LearnedFactor(3), coupling=Affine()) for _ in range(4)]
    sequence = ReversibleSequential(*blocks).double()
    twin = copy.deepcopy(sequence)
    set_policy(twin, Store())
    x = stream(5, 6).requires_grad_()
    for policy in (Reverse(), Reverse(hold="f"), Checkpoint()):
        set_policy(sequence, policy)
        of_both = [torch.autograd.grad(squares(module(x)), [x, *module.parameters()]) for module in (sequence, twin)]
        for one, other in zip(*of_both, strict=True):
            assert one.abs().min() > 0
            assert_close(one, other, tolerance=1e-13)
    with torch.no_grad():
        assert_close(sequence.inverse(sequence(x)), x, tolerance=1e-12)
    _, log_det = sequence.forward_with_log_det(x)
    jacobian = torch.autograd.functional.jacobian(lambda row: sequence(row[None])[0], x[0].detach())
    assert_close(log_det[0], jacobian.slogdet()[1], tolerance=1e-12)


@pytest.mark.parametrize("shape", [(4,), (2, 5, 3), (5, 1, 3)])
def test_rejects_a_factor_that_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"`f` returned a scale of shape .* which must broadcast"):
        Affine().forward(stream(5, 3), (stream(5, 3), stream(*shape)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_pair_is_refused_when_compiled():
    sequence = ReversibleSequential(ReversibleBlock(LearnedFactor(3), LearnedFactor(3), coupling=Affine()))
    with pytest.raises(Exception, match=r"`blocks.0.f` returned tuple of 2.*needs one tensor; compile the residual"):
        torch.compile(sequence, backend="aot_eager")(torch.randn(4, 6, requires_grad=True))
