"""The workloads: residual functions and matching streams. To add one, add an entry to `CASES`.

B C H W: batch, channels, height, width of one stream; B T D: batch, tokens, features of one stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._types import TensorPair
from revnet.models.resnet import BasicResidual

FunctionPair = tuple[nn.Module, nn.Module]
"""The residual functions `f, g` of one reversible block."""


class Attention(nn.Module):
    """Layer norm and self-attention over all tokens.

    Shape:
        x: (B, T, D). Output: the same.
    """

    def __init__(self, num_features: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.qkv = nn.Linear(num_features, 3 * num_features)
        self.project = nn.Linear(num_features, num_features)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual of `x`."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # B, heads, T, D'
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(B, T, D))


def feed_forward(num_features: int) -> nn.Sequential:
    """Return a layer norm and a perceptron whose hidden layer is four times wider than its input."""
    return nn.Sequential(
        nn.LayerNorm(num_features),
        nn.Linear(num_features, 4 * num_features),
        nn.GELU(),
        nn.Linear(4 * num_features, num_features),
    )


@dataclass(frozen=True)
class Case:
    """A workload: a sequence of reversible blocks of one kind, in float32."""

    name: str
    description: str
    """Description for the report."""
    make_block: Callable[[], FunctionPair]
    stream_shape: tuple[int, ...]
    split_dim: int
    """Dimension along which the streams are concatenated, for methods that can choose."""

    def functions(self, depth: int, device: torch.device) -> list[FunctionPair]:
        """Return the residual functions of `depth` blocks, with the same weights at each call."""
        torch.manual_seed(0)
        return [(f.to(device), g.to(device)) for f, g in (self.make_block() for _ in range(depth))]

    def streams(self, seed: int) -> TensorPair:
        """Return a pair of random streams that depends only on the seed."""
        generator = torch.Generator().manual_seed(seed)
        x1, x2 = (torch.randn(self.stream_shape, generator=generator) for _ in range(2))
        return x1, x2


CASES: Sequence[Case] = (
    Case(
        "conv",
        "F = G = BN-ReLU-conv3x3-BN-ReLU-conv3x3; streams of 32 channels, 32x32 pixels, batch 32 (4 MiB each)",
        lambda: (BasicResidual(32, 32), BasicResidual(32, 32)),
        (32, 32, 32, 32),
        split_dim=1,
    ),
    Case(
        "transformer",
        "F = LN + 4-head attention, G = LN + MLP x4 (GELU); streams of 256 features, 256 tokens, batch 8 (2 MiB each)",
        lambda: (Attention(256, num_heads=4), feed_forward(256)),
        (8, 256, 256),
        split_dim=2,
    ),
)
