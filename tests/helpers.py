"""Every kind of block and policy, once. The contracts run over these lists: a newcomer is tested by being added."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, Store


class ConvResidual(nn.Module):
    """BN, ReLU, 3x3 convolution, twice: the paper's F and G."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_channels)
        self.conv1 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_channels)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class Attention(nn.Module):
    """Layer norm and self-attention, with an optional mask and a context that is added to the keys."""

    def __init__(self, num_features: int, num_heads: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.qkv = nn.Linear(num_features, 3 * num_features)
        self.project = nn.Linear(num_features, num_features)
        self.num_heads = num_heads

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        if context is not None:
            k = k + context
        q, k, v = (t.view(B, T, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.project(y.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """Layer norm and a two-layer perceptron, ignoring the attention's arguments."""

    def __init__(self, num_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.layers = nn.Sequential(
            nn.Linear(num_features, 2 * num_features), nn.GELU(), nn.Linear(2 * num_features, num_features)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layers(self.norm(x))


def mlp(num_features: int) -> nn.Sequential:
    """Smooth everywhere, for numerical derivatives."""
    return nn.Sequential(nn.Linear(num_features, num_features), nn.Tanh(), nn.Linear(num_features, num_features))


@dataclass(frozen=True)
class Case:
    """A kind of block with inputs that fit it; all in float64, so that tolerances can be tight."""

    name: str
    make_block: Callable[[], ReversibleBlock]
    shape: tuple[int, ...]
    args: Callable[[], tuple[Any, ...]] = tuple
    kwargs: Callable[[], dict[str, Any]] = field(default=dict)

    def sequence(self, depth: int, policy: AbstractPolicy | list[AbstractPolicy] | None = None) -> ReversibleSequential:
        sequence = ReversibleSequential(*[self.make_block() for _ in range(depth)], policy=policy or Reverse())
        return sequence.double()

    def input(self, *, requires_grad: bool = True) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, requires_grad=requires_grad)


def _attention_block() -> ReversibleBlock:
    return ReversibleBlock(Attention(4), FeedForward(4), split_dim=-1)


CASES = [
    Case("conv", lambda: ReversibleBlock(ConvResidual(3), ConvResidual(3)), (2, 6, 5, 5)),
    Case(
        "conv-dropout",
        lambda: ReversibleBlock(
            nn.Sequential(ConvResidual(3), nn.Dropout(0.3)), nn.Sequential(nn.Dropout2d(0.3), ConvResidual(3))
        ),
        (2, 6, 5, 5),
    ),
    Case("mlp", lambda: ReversibleBlock(mlp(3), mlp(3), split_dim=-1), (4, 6)),
    Case("attention", _attention_block, (2, 5, 8)),
    Case(
        "attention-context-mask",
        _attention_block,
        (2, 5, 8),
        args=lambda: (torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True),),
        kwargs=lambda: {"mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    ),
    Case(
        "spectral-norm",
        lambda: ReversibleBlock(
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            nn.Sequential(nn.Tanh(), nn.Linear(3, 3)),
            split_dim=1,
        ),
        (4, 6),
    ),
    Case(
        "split-batch",
        lambda: ReversibleBlock(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3), split_dim=0),
        (4, 3),
    ),
]

CASE = {case.name: case for case in CASES}

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

DEPTH = 4
REVERSING_POLICIES = {
    "reverse": Reverse(),
    "mixed": [Reverse(), Store(), Reverse(), Reverse()],
    "store-last": [Reverse(), Reverse(), Reverse(), Store()],
}
all_policies = pytest.mark.parametrize("policy", REVERSING_POLICIES.values(), ids=REVERSING_POLICIES.keys())


def stored_twin(sequence: ReversibleSequential) -> ReversibleSequential:
    """The same blocks, copied, with every activation kept: the reference of every comparison."""
    return ReversibleSequential(*copy.deepcopy(list(sequence)), policy=Store())


def assert_close(actual: Any, expected: Any, *, tolerance: float = 1e-9) -> None:
    """Equal up to the rounding of a reconstruction in float64, a few hundred units in the last place."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_trains_as_twin(
    sequence: ReversibleSequential, case: Case, step: Callable[..., object], *, tolerance: float = 1e-9
) -> None:
    """`step(module, x, args, kwargs)` leaves on the sequence and its input the gradients that it leaves on the twin's.

    Both start from the same random state.
    """
    twin = stored_twin(sequence)
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    twin_x = x.detach().clone().requires_grad_()
    for module, start in ((sequence, x), (twin, twin_x)):
        torch.manual_seed(1)
        step(module, start, args, kwargs)
    assert x.grad is not None
    assert_close(x.grad, twin_x.grad, tolerance=tolerance)
    assert_close(gradients(sequence), gradients(twin), tolerance=tolerance)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}
