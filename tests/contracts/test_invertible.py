"""Inverse, log-determinant and gradients of every invertible layer. A new layer is tested once it is in the list."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from revnet.coupling import Additive, Affine
from revnet.nn import (
    AbstractInvertible,
    ActNorm,
    ChannelPermutation,
    CouplingLayer,
    FlowStep,
    HaarWavelet,
    InvertibleConv1x1,
    InvertibleSequential,
    SpaceToDepth,
)
from tests.helpers import ConvResidual, assert_close


@dataclass(frozen=True)
class Layer:
    name: str
    make: Callable[[], AbstractInvertible]
    shape: tuple[int, ...] = (2, 4, 4, 6)


class ScalingConv(nn.Sequential):
    def __init__(self, num_channels: int):
        super().__init__(nn.Conv2d(num_channels, num_channels, 3, padding=1), nn.Tanh())
        self.append(nn.Conv2d(num_channels, 2 * num_channels, 1))


def _network() -> InvertibleSequential:
    return InvertibleSequential(
        SpaceToDepth(),
        CouplingLayer(ScalingConv(2), updates=0, coupling=Affine()),
        CouplingLayer(ScalingConv(2), updates=1, coupling=Affine("sigmoid")),
        InvertibleConv1x1(4),
        ReversibleBlock(ConvResidual(2), ConvResidual(2)),
        InvertibleSequential(HaarWavelet(), ChannelPermutation(16)),
        ReversibleSequential(ReversibleBlock(ConvResidual(8), ConvResidual(8))),
    )


def _flow_steps() -> InvertibleSequential:
    steps = [FlowStep(ScalingConv(2), num_channels=4, updates=index) for index in (0, 1)]
    return InvertibleSequential(*steps, FlowStep(ConvResidual(2), num_channels=4, mixes=False, coupling=Additive()))


LAYERS = [
    Layer("space-to-depth", SpaceToDepth),
    Layer("space-to-depth-3", lambda: SpaceToDepth(3), (1, 2, 3, 6)),
    Layer("haar", HaarWavelet),
    Layer("permutation", lambda: ChannelPermutation(4)),
    Layer("permutation-vector", lambda: ChannelPermutation(3, [2, 0, 1]), (2, 3)),
    Layer("conv1x1", lambda: InvertibleConv1x1(4)),
    Layer("conv1x1-vector", lambda: InvertibleConv1x1(3), (2, 3)),
    Layer("conv1x1-alone", lambda: InvertibleConv1x1(1), (2, 1, 5)),
    Layer("act-norm", lambda: ActNorm(4)),
    Layer("act-norm-vector", lambda: ActNorm(3), (2, 3)),
    Layer("flow-steps", _flow_steps),
    Layer("network", _network, (2, 1, 4, 8)),
]
all_layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)


def make(layer: Layer) -> AbstractInvertible:
    """Return a layer in evaluation mode whose parameters differ from their initial values."""
    module = layer.make().double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def inputs(layer: Layer) -> torch.Tensor:
    return torch.randn(layer.shape, dtype=torch.float64, requires_grad=True)


@all_layers
def test_inverse_restores_the_input(layer):
    module, x = make(layer), inputs(layer)
    y = module(x)
    assert y.numel() == x.numel()
    assert_close(module.inverse(y), x, tolerance=1e-11)
    z = torch.randn_like(y)
    assert_close(module(module.inverse(z)), z, tolerance=1e-11)


@all_layers
def test_log_determinant_equals_the_jacobian(layer):
    module, x = make(layer), inputs(layer)
    y, log_det = module.forward_with_log_det(x)
    assert torch.equal(y, module(x))
    assert torch.equal(log_det, module.log_det(x))
    assert log_det.dtype == x.dtype
    for index in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0], x[index].detach())
        assert_close(log_det[index], jacobian.view(x[index].numel(), -1).slogdet().logabsdet, tolerance=1e-11)


@all_layers
def test_gradcheck(layer):
    module, x = make(layer), inputs(layer)
    parameters = tuple(module.parameters())
    if sum(parameter.numel() for parameter in parameters) > 50:
        parameters = ()  # Parameters of blocks are compared with their twins in test_log_det.
    assert torch.autograd.gradcheck(lambda x, *_: module.forward_with_log_det(x), (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(module.inverse, module(x).detach().requires_grad_(), fast_mode=True)


@all_layers
def test_copy_with_the_state_dict(layer):
    module, other, x = make(layer), make(layer), inputs(layer)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@all_layers
def test_meta_device(layer):
    with torch.device("meta"):
        module = layer.make()
        y = module(torch.empty(layer.shape))
    assert y.shape == make(layer)(inputs(layer)).shape


@all_layers
def test_inverse_under_autocast_has_float32_accuracy(layer):
    module = make(layer).float()
    x = inputs(layer).detach().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.float32
        assert_close(module.inverse(y), x, tolerance=1e-4)  # some roundings times the condition of the matrices


@all_layers
def test_empty_batch(layer):
    module = make(layer)
    x = torch.empty(0, *layer.shape[1:], dtype=torch.float64)
    y, log_det = module.forward_with_log_det(x)
    assert y.shape == (0, *module(inputs(layer)).shape[1:])
    assert log_det.shape == (0,)
    assert module.inverse(y).shape == x.shape
