import pytest
import torch
from torch import nn

from revnet import Store, set_policy
from revnet.coupling import Affine
from revnet.memory import measure
from revnet.nn import CouplingLayer, HaarWavelet, InvertibleSequential, MultiScaleSequential, SpaceToDepth
from tests.helpers import assert_close, gradients


class Conditioned(nn.Module):
    """Shift and scale of a stream, given the other stream and a context, (B, 2)."""

    def __init__(self, num_channels):
        super().__init__()
        self.conv = nn.Conv2d(num_channels, 2 * num_channels, 3, padding=1)
        self.shift = nn.Linear(2, 2 * num_channels)

    def forward(self, x, context=None):
        y = self.conv(x)
        return torch.tanh(y if context is None else y + self.shift(context)[:, :, None, None])


def scale(num_channels, depth=2):
    layers = [
        CouplingLayer(Conditioned(num_channels // 2), updates=index % 2, coupling=Affine()) for index in range(depth)
    ]
    return InvertibleSequential(SpaceToDepth(), *layers)


def model(depth=2):
    return MultiScaleSequential(scale(4, depth), scale(8, depth), scale(16, depth))


def joined(codes):
    return torch.cat([code.flatten(1) for code in codes], 1)


def images(num_images=2, side=8, dtype=torch.float64):
    return torch.randn(num_images, 1, side, side, dtype=dtype)


def test_each_scale_but_the_last_factors_out_half_of_its_channels():
    codes = model()(images(dtype=torch.float32))
    assert [tuple(code.shape) for code in codes] == [(2, 2, 4, 4), (2, 4, 2, 2), (2, 16, 1, 1)]
    first = MultiScaleSequential(SpaceToDepth(), HaarWavelet())
    x = images()
    expected = SpaceToDepth()(x)
    codes = first(x)
    assert torch.equal(codes[0], expected[:, 2:])
    assert torch.equal(codes[1], HaarWavelet()(expected[:, :2]))


@pytest.mark.parametrize("context", [None, torch.randn(2, 2, dtype=torch.float64)], ids=["", "context"])
def test_inverse_and_log_determinant(context):
    flow, x = model().double(), images()
    arguments = () if context is None else (context,)
    codes, log_det = flow.forward_with_log_det(x, *arguments)
    assert_close(flow.inverse(codes, *arguments), x, tolerance=1e-12)
    assert torch.equal(log_det, flow.log_det(x, *arguments))
    for index in range(2):
        own = [argument[index : index + 1] for argument in arguments]
        jacobian = torch.autograd.functional.jacobian(lambda v: joined(flow(v[None], *own))[0], x[index])  # noqa: B023
        assert_close(log_det[index], jacobian.view(64, 64).slogdet().logabsdet, tolerance=1e-12)


def test_gradients_equal_plain_autograd():
    flow = model().double()
    found = []
    x, context = images(), torch.randn(2, 2, dtype=torch.float64)
    for policy in ("store", "reverse"):
        set_policy(flow, policy)
        flow.zero_grad()
        leaves = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        codes, log_det = flow.forward_with_log_det(*leaves)
        (joined(codes).square().sum() - log_det.sum()).backward()
        found.append({**gradients(flow), "inputs": [leaf.grad for leaf in leaves]})
    assert_close(found[1], found[0])


def test_memory_does_not_grow_with_the_depth_of_a_scale():
    def activation_bytes(depth, policy=None):
        flow = model(depth)
        if policy is not None:
            set_policy(flow, policy)
        loss = lambda codes: joined(codes).square().sum()  # noqa: E731
        return measure(flow, images(2, 16, torch.float32), loss=loss).activation_bytes

    assert activation_bytes(2) == activation_bytes(4) == activation_bytes(16)
    assert activation_bytes(16, Store()) > 3 * activation_bytes(16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MultiScaleSequential(), ValueError, "`scales` must hold at least one scale"),
        (lambda: MultiScaleSequential(nn.Linear(2, 2)), TypeError, r"`scales\[0\]` \(=Linear\) must be an invertible"),
        (
            lambda: MultiScaleSequential(InvertibleSequential(), SpaceToDepth())(torch.rand(2, 3, 4, 4)),
            ValueError,
            r"`scales\[0\]` returned shape \(2, 3, 4, 4\), but must return an even number of channels",
        ),
        (lambda: model().inverse(torch.rand(2, 3)), TypeError, r"`codes` \(=a tensor .*\) must be a tuple"),
        (lambda: model().inverse((torch.rand(2, 3),)), ValueError, r"`codes` \(=tuple of 1\) must hold one tensor for"),
        (
            lambda: MultiScaleSequential(SpaceToDepth(), SpaceToDepth()).inverse((torch.rand(1, 2, 2, 2),) * 2),
            ValueError,
            r"`y` \(of shape \(1, 2, 2, 2\)\) must have a multiple of 4 channels",
        ),
        (
            lambda: MultiScaleSequential(SpaceToDepth(), SpaceToDepth()).inverse(
                (torch.rand(1, 2, 2, 2), torch.rand(1, 8, 2, 2))
            ),
            ValueError,
            r"`codes\[0\]` has shape \(1, 2, 2, 2\), but the later codes make \(1, 2, 4, 4\)",
        ),
    ],
)
def test_rejects_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
