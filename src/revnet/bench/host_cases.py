"""Workloads and methods of `revnet bench --host`: blocks so small that their arithmetic hardly matters."""

from collections.abc import Callable, Sequence
from importlib import import_module

from torch import nn

import revnet
from revnet.bench._torch_methods import Loop
from revnet.bench.cases import Attention, Case, FunctionPair, feed_forward
from revnet.bench.methods import METHODS, Method
from revnet.nn import AbstractPolicy, Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store


def conv_residual(num_channels: int) -> nn.Sequential:
    """Return batch norm, ReLU and a 3x3 convolution, twice, built from PyTorch's modules."""
    layers: list[nn.Module] = []
    for _ in range(2):
        convolution = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        layers += [nn.BatchNorm2d(num_channels), nn.ReLU(), convolution]
    return nn.Sequential(*layers)


HOST_CASES: Sequence[Case] = (
    Case(
        "conv",
        "F = G = BN-ReLU-conv3x3, twice, no bias; streams of 4 channels, 4x4 pixels, batch 1",
        lambda: (conv_residual(4), conv_residual(4)),
        (1, 4, 4, 4),
        split_dim=1,
    ),
    Case(
        "transformer",
        "F = LN + 2-head attention, G = LN + MLP x4 (GELU); streams of 8 features, 4 tokens, batch 1",
        lambda: (Attention(8, num_heads=2), feed_forward(8)),
        (1, 4, 8),
        split_dim=2,
    ),
)


def _sequence(policy: AbstractPolicy, *, is_exact: bool = False) -> Callable[[Sequence[FunctionPair], int], nn.Module]:
    """Return a function that builds a sequence of this library with `policy` and additive or exact couplings."""

    def make(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
        coupling = revnet.FixedPoint() if is_exact else revnet.Additive()
        blocks = [ReversibleBlock(f, g, split_dim=split_dim, coupling=coupling) for f, g in functions]
        return ReversibleSequential(*blocks, policy=policy)

    return make


def _revtorch_by_default(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    revtorch = import_module("revtorch.revtorch")
    return revtorch.ReversibleSequence(
        nn.ModuleList([revtorch.ReversibleBlock(f, g, split_along_dim=split_dim) for f, g in functions])
    )


def _known(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


LOOP = Method("plain", "the loop `x1 = x1 + f(x2); x2 = x2 + g(x1)`, between `chunk` and `cat`", Loop)
"""Baseline of the comparison on the host."""

HOST_METHODS: Sequence[Method] = (
    LOOP,
    Method(
        "revtorch",
        "`ReversibleSequence`, its default mode, which is correct only for functions without randomness; "
        "`fix_random_seed=True` costs four times as much here",
        _revtorch_by_default,
        "revtorch",
    ),
    *map(_known, ("revlib", "memcnn", "checkpoint", "selective checkpoint", "save_on_cpu", "compile, budget")),
    Method("revnet, Reverse()", "`ReversibleSequential(..., policy=Reverse())`, the default", _sequence(Reverse())),
    Method(
        "revnet, hold",
        '`Reverse(hold=("f", "g"))`, which holds the stream that each function reads',
        _sequence(Reverse(hold=("f", "g"))),
    ),
    Method(
        "revnet, keep",
        '`Reverse(keep=("convolution", "linear", "attention"))`, which keeps two outputs of each function, or five of '
        "each block of the transformer",
        _sequence(Reverse(keep=("convolution", "linear", "attention"))),
    ),
    Method("revnet, Checkpoint()", "`ReversibleSequential` with `Checkpoint()`", _sequence(Checkpoint())),
    Method(
        "revnet, FixedPoint()",
        "`Reverse()` with `FixedPoint()` couplings, which rebuild every bit",
        _sequence(Reverse(), is_exact=True),
    ),
    Method("revnet, Store()", "the same with `Store()`: plain autograd with revnet's interface", _sequence(Store())),
)
