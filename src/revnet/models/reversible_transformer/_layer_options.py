"""The options of the layers of a transformer, which language models, encoders and decoders share."""

import math
from dataclasses import dataclass

from torch import nn

from revnet._checks import (
    MOST_CHANNELS,
    check_block_size,
    check_bool,
    check_choice,
    check_counts,
    check_positive_number,
    check_share,
)
from revnet.functional._rotary import check_head_dim
from revnet.models._checks import check_heads, check_ratio
from revnet.models.reversible_transformer._residuals import AttentionResidual, CrossAttentionResidual, FeedForward
from revnet.nn.attention import CrossAttention, FullAttention, HierarchicalAttention, LSHAttention

ATTENTIONS = ("full", "lsh", "hierarchical")
"""Values of `attention` in `ReversibleTransformer`."""
NORMS = ("layer", "rms")
"""Values of `norm` in `ReversibleTransformer`."""
MLPS = ("gelu", "swiglu")
"""Values of `mlp` in `ReversibleTransformer`."""
_DEVIATION = 0.02
"""Standard deviation of the initial weights."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The options of the layers: see `ReversibleTransformer`."""

    dim: int
    num_heads: int
    max_length: int
    is_causal: bool = True
    num_kv_heads: int | None = None
    attention: str = "full"
    bucket_size: int = 64
    num_hashes: int = 4
    block_size: int = 64
    norm: str = "layer"
    norm_eps: float = 1e-5
    mlp: str = "gelu"
    ff_mult: float = 4.0
    ff_chunks: int = 1
    bias: bool = True
    rope_theta: float = 10_000.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_counts(max_length=self.max_length, ff_chunks=self.ff_chunks)
        check_counts(bucket_size=self.bucket_size, num_hashes=self.num_hashes)
        check_counts(dim=self.dim, num_heads=self.num_heads, most=MOST_CHANNELS)
        check_block_size(self.block_size)
        check_bool(is_causal=self.is_causal, bias=self.bias)
        check_share(dropout=self.dropout)
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("mlp", self.mlp, MLPS)
        check_positive_number("norm_eps", self.norm_eps, hint="1e-5 is usual")
        check_positive_number("rope_theta", self.rope_theta, hint="10,000 is usual")
        check_ratio("ff_mult", self.ff_mult, self.dim)
        check_heads(self.dim, self.num_heads)
        if self.attention == "lsh" and self.num_kv_heads is not None:
            raise ValueError(
                f"`num_kv_heads` (={self.num_kv_heads}) must be None for LSH attention, whose queries serve as keys; "
                "pass `attention='full'` or 'hierarchical'."
            )
        check_head_dim(self.head_dim)

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.dim // self.num_heads

    def make_norm(self, dim: int) -> nn.Module:
        """Return a norm of `dim` features."""
        if self.norm == "rms":
            return nn.RMSNorm(dim, eps=self.norm_eps)
        return nn.LayerNorm(dim, eps=self.norm_eps, bias=self.bias)

    def make_functions(self, index: int, *, context_dim: int | None = None) -> tuple[nn.Module, nn.Module]:
        """Return the residual functions f and g of a layer.

        Args:
            index: Index of the layer.
            context_dim: Features of a token of the encoder's output, for a decoder; None for no encoder.
        """
        attention = AttentionResidual(
            self.dim, self._make_attention(index), dropout=self.dropout, norm=self.make_norm(self.dim)
        )
        f: nn.Module = attention
        if context_dim is not None:
            cross_attention = CrossAttention(
                self.dim,
                self.num_heads,
                context_dim=context_dim,
                num_kv_heads=self.num_kv_heads,
                layer_index=index,
            )
            f = CrossAttentionResidual(attention, self.make_norm(self.dim), cross_attention, dropout=self.dropout)
        g = FeedForward(
            self.dim,
            round(self.dim * self.ff_mult),
            num_chunks=self.ff_chunks,
            dropout=self.dropout,
            norm=self.make_norm(self.dim),
            mlp=self.mlp,
            bias=self.bias,
        )
        return f, g

    def _make_attention(self, index: int) -> nn.Module:
        if self.attention == "lsh":
            return LSHAttention(
                self.dim,
                self.num_heads,
                is_causal=self.is_causal,
                bucket_size=self.bucket_size,
                num_hashes=self.num_hashes,
                max_length=self.max_length,
            )
        if self.attention == "hierarchical":
            return HierarchicalAttention(
                self.dim,
                self.num_heads,
                is_causal=self.is_causal,
                block_size=self.block_size,
                num_kv_heads=self.num_kv_heads,
            )
        return FullAttention(
            self.dim,
            self.num_heads,
            is_causal=self.is_causal,
            num_kv_heads=self.num_kv_heads,
            layer_index=index,
        )


def initialize(model: nn.Module, num_layers: int) -> None:
    """Initialize the weights like GPT-2.

    Normal with standard deviation 0.02. The last layer of each residual divides it by the square root of the number of
    residuals.
    """
    ends = {id(end) for end in ends_of_residuals(model)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = _DEVIATION / math.sqrt(2 * num_layers) if id(module) in ends else _DEVIATION
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def ends_of_residuals(model: nn.Module) -> list[nn.Linear]:
    """Return the last layer of each residual function in `model`."""
    attentions = FullAttention | HierarchicalAttention | LSHAttention | CrossAttention
    return [
        *[module.last_layer for module in model.modules() if isinstance(module, FeedForward)],
        *[module.project for module in model.modules() if isinstance(module, attentions)],
    ]
