"""The penalty and its gradient match the equation, and memory does not grow with depth."""

import copy

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential, Store
from revnet.coupling import Affine, FixedPoint
from revnet.memory import measure
from revnet.numerics import conditioning_penalty, measure_drift
from tests.helpers import ConvResidual, assert_same_buffers, mlp


def sequence(depth=3, make=mlp, width=3, coupling=None):
    options = {} if coupling is None else {"coupling": coupling}
    return ReversibleSequential(*[ReversibleBlock(make(width), make(width), **options) for _ in range(depth)]).double()


def linear_map(matrix):
    """Return one linear block: y1 = x1 + A x2, y2 = x2 + B y1."""
    half = len(matrix) // 2
    block = ReversibleBlock(nn.Linear(half, half, bias=False), nn.Linear(half, half, bias=False)).double()
    with torch.no_grad():
        block.f.weight.copy_(matrix[:half, half:])
        block.g.weight.copy_(matrix[half:, :half])
    return ReversibleSequential(block)


@pytest.mark.parametrize("model", [linear_map(torch.zeros(4, 4)), ReversibleSequential()], ids=["zero", "empty"])
def test_an_isometry_costs_one_in_each_direction(model):
    x = torch.randn(5, 4, dtype=torch.float64)
    assert conditioning_penalty(model, x).item() == pytest.approx(2)
    assert conditioning_penalty(model, x, forward_weight=3, inverse_weight=0).item() == pytest.approx(3)
    assert conditioning_penalty(model, x, forward_weight=0, inverse_weight=0.5).item() == pytest.approx(0.5)


def test_the_penalty_of_a_linear_map_is_the_mean_square_of_its_singular_values():
    model = linear_map(torch.randn(4, 4, dtype=torch.float64))
    x = torch.zeros(20_000, 4, dtype=torch.float64)
    jacobian = model(torch.eye(4, dtype=torch.float64)).T
    for weights, matrix in (((1, 0), jacobian), ((0, 1), torch.linalg.inv(jacobian))):
        penalty = conditioning_penalty(model, x, forward_weight=weights[0], inverse_weight=weights[1])
        expected = torch.linalg.svdvals(matrix).square().mean()
        # The mean of 20,000 draws, whose spread is about as large as they are.
        assert penalty.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("make", [mlp, ConvResidual], ids=["mlp", "conv-batch-norm"])
@pytest.mark.parametrize("coupling", [None, Affine()], ids=["additive", "affine"])
def test_the_gradient_equals_plain_autograd(make, coupling):
    if coupling is not None:
        model = ReversibleSequential(
            *[ReversibleBlock(_twice(make), _twice(make), coupling=coupling) for _ in range(3)]
        ).double()
    else:
        model = sequence(make=make)
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64) if make is ConvResidual else torch.randn(4, 6, dtype=torch.float64)
    x.requires_grad_()
    twin = ReversibleSequential(*copy.deepcopy(list(model)), policy=Store())
    before = copy.deepcopy(model)
    torch.manual_seed(1)
    penalty = conditioning_penalty(model, x, forward_weight=0.3, inverse_weight=0.7, step=0.05)
    assert_same_buffers(model, before)
    torch.manual_seed(1)
    expected = written_out(twin, x, 0.3, 0.7, 0.05)
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-9)
    actual = torch.autograd.grad(penalty, [x, *model.parameters()])
    wanted = torch.autograd.grad(expected, [x, *twin.parameters()])
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)  # the rounding of rebuilt activations
    assert_same_buffers(model, before)


def _twice(make):
    """Return a residual function with twice the outputs, for a coupling that scales."""
    widen = nn.Conv2d(3, 6, 1) if make is ConvResidual else nn.Linear(3, 6)
    return nn.Sequential(make(3), widen)


def written_out(model, x, forward_weight, inverse_weight, step):
    def moved(z):
        noise = torch.randn_like(z)
        return z + step * noise / noise.flatten(1).norm(dim=1).view(-1, *[1] * (z.dim() - 1))

    def squares(z):
        return z.square().flatten(1).sum(1).mean() / step**2

    y = model(x)
    return forward_weight * squares(model(moved(x)) - y) + inverse_weight * squares(model.inverse(moved(y)) - x)


def test_the_gradient_equals_finite_differences():
    model, x = sequence(depth=2), torch.randn(3, 6, dtype=torch.float64)
    parameters = list(model.parameters())

    def penalty(*values):
        torch.manual_seed(2)
        return torch.func.functional_call(_Penalized(model), dict(zip(_names(model), values, strict=True)), (x,))

    assert torch.autograd.gradcheck(penalty, [parameter.detach().requires_grad_() for parameter in parameters])


class _Penalized(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return conditioning_penalty(self.model, x)


def _names(model):
    return [f"model.{name}" for name, _ in model.named_parameters()]


def test_accepts_pairs_fixed_point_couplings_and_arguments():
    class Scaled(nn.Linear):
        def forward(self, x, factor, *, shift):
            return super().forward(x) * factor + shift

    blocks = [ReversibleBlock(Scaled(3, 3), Scaled(3, 3), coupling=FixedPoint()) for _ in range(3)]
    x = torch.randn(4, 3), torch.randn(4, 3)
    penalty = conditioning_penalty(ReversibleSequential(*blocks), x, 0.5, kwargs={"shift": 0.1})
    penalty.backward()
    assert penalty.item() > 0
    assert all(
        parameter.grad.isfinite().all() for block in blocks for parameter in block.parameters() if parameter.dim() > 1
    )


def test_memory_does_not_grow_with_depth():
    x = torch.randn(64, 32)
    peaks = []
    for depth in (4, 16):
        model = sequence(depth, width=16).float()
        memory = measure(_Penalized(model), x, loss=lambda penalty: penalty)
        peaks.append(memory.held_bytes)
    assert peaks[0] == peaks[1]


def test_minimizing_the_penalty_lowers_the_amplification():
    model = sequence(8, lambda width: nn.Linear(width, width), width=8)
    x = torch.randn(32, 16, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    before = measure_drift(model, x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        conditioning_penalty(model, x).log().backward()
        optimizer.step()
    after = measure_drift(model, x)
    # Undoing a linear block multiplies errors by 5 before and by 1.5 after: eight blocks, by 4e5 and by 26.
    assert after.error < before.error / 100
    assert after.amplification < before.amplification


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, x: conditioning_penalty(m[0], x),
            TypeError,
            r"`sequence` \(=ReversibleBlock\) must be a Reversible",
        ),
        (
            lambda m, x: conditioning_penalty(m, x, forward_weight=-1),
            ValueError,
            r"`forward_weight` \(=-1\) must be",
        ),
        (
            lambda m, x: conditioning_penalty(m, x, inverse_weight=-1),
            ValueError,
            r"`inverse_weight` \(=-1\) must be",
        ),
        (lambda m, x: conditioning_penalty(m, x, inverse_weight="x"), ValueError, r"`inverse_weight` \(='x'\) must be"),
        (lambda m, x: conditioning_penalty(m, x, kwargs=[1]), TypeError, r"`kwargs` \(=list\) must be a dict"),
        (lambda m, x: conditioning_penalty(m, x, step=0), ValueError, r"`step` \(=0\) must be a positive number"),
        (lambda m, x: conditioning_penalty(m, x, step="a"), ValueError, r"`step` \(='a'\) must be a positive number"),
        (lambda m, x: conditioning_penalty(m, x, num_blocks=1.5), ValueError, r"`num_blocks` \(=1.5\) must be a pos"),
        (
            lambda m, x: conditioning_penalty(
                ReversibleSequential(ReversibleBlock(nn.Sequential(mlp(3), nn.Dropout(0.1)), mlp(3))), x
            ),
            ValueError,
            "has dropout in training mode, `blocks.0.f.1`, so every pass runs a different network",
        ),
    ],
)
def test_rejects_wrong_arguments_in_one_line(call, error, message):
    with pytest.raises(error, match=message):
        call(sequence(), torch.randn(4, 6))
