"""Residual functions of transformers: attention, attention to an encoder's output, and perceptrons.

B T: batch and length of the tokens; D: features of a token in one stream; S: length of the encoder's output.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from revnet.functional._chunked import chunked
from revnet.nn.attention import CrossAttention
from revnet.nn.attention.key_values import AbstractKeyValueCache


class AttentionResidual(nn.Module):
    """The residual function f: a norm and attention.

    Args:
        dim: Features of a token.
        attention: The attention.
        dropout: Share of features dropped from the residual.
        norm: The norm; None for `nn.LayerNorm(dim)`.

    Shape:
        x: (B, T, D). Output: the same.
    """

    def __init__(self, dim: int, attention: nn.Module, *, dropout: float = 0.0, norm: nn.Module | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm is None else norm
        self.attention = attention
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Return the residual of `x`."""
        if cache is None:
            return self.dropout(self.attention(self.norm(x), mask=mask, rotary=rotary))
        return self.dropout(self.attention(self.norm(x), mask=mask, rotary=rotary, cache=cache))


class CrossAttentionResidual(nn.Module):
    """The residual function f of a decoder: attention, and attention to an encoder's output on top of it.

    It returns `a + c(x + a)`, where `a` is the residual of the attention to earlier tokens of `x`, and `c` the residual
    of the attention to the output of the encoder.

    Args:
        attention: Residual function of the attention to earlier tokens.
        norm: Norm before the attention to the encoder's output.
        cross_attention: Attention to the encoder's output.
        dropout: Share of features dropped from its residual.

    Shape:
        x: (B, T, D). context: (B, S, E). context_mask: (B, S), bool, true where a token is real. Output: (B, T, D).
    """

    def __init__(
        self, attention: AttentionResidual, norm: nn.Module, cross_attention: CrossAttention, *, dropout: float = 0.0
    ):
        super().__init__()
        self.attention = attention
        self.norm = norm
        self.cross_attention = cross_attention
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor,
        context_mask: Tensor | None = None,
        cache: AbstractKeyValueCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the residual of `x`, a sequence that continues what `context` holds."""
        residual = self.attention(x, cache=cache, **kwargs)
        y = self.cross_attention(self.norm(x + residual), context, mask=context_mask, cache=cache)
        result: Tensor = residual + self.dropout(y)
        return result


class SwiGLU(nn.Module):
    """A perceptron whose hidden layer is gated: `down(silu(gate(x)) * up(x))`.

    Args:
        dim: Features of a token.
        hidden_dim: Features of the hidden layer.
        bias: Whether the three layers have biases.

    Shape:
        x: (..., dim). Output: the same.

    References:
        Shazeer (2020), GLU Variants Improve Transformer.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of each token."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class FeedForward(nn.Module):
    """The residual function g: a norm and a perceptron on each token.

    With several chunks, the hidden layer exists for one chunk of tokens at a time, also in the backward pass, which
    computes it again. The result is the same up to the rounding of matrix products of a different size.

    Args:
        dim: Features of a token.
        hidden_dim: Features of the hidden layer.
        num_chunks: Number of chunks of tokens that run one after the other.
        dropout: Share of features dropped from the residual.
        norm: The norm; None for `nn.LayerNorm(dim)`.
        mlp: "gelu" for two layers with a GELU between them, "swiglu" for a gated hidden layer.
        bias: Whether the layers have biases.

    Shape:
        x: (B, T, D). Output: the same.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        num_chunks: int = 1,
        dropout: float = 0.0,
        norm: nn.Module | None = None,
        mlp: str = "gelu",
        bias: bool = True,
    ):
        super().__init__()
        self.num_chunks = num_chunks
        norm = nn.LayerNorm(dim) if norm is None else norm
        if mlp == "swiglu":
            self.layers = nn.Sequential(norm, SwiGLU(dim, hidden_dim, bias=bias))
        else:
            self.layers = nn.Sequential(
                norm, nn.Linear(dim, hidden_dim, bias=bias), nn.GELU(), nn.Linear(hidden_dim, dim, bias=bias)
            )
        self.dropout = nn.Dropout(dropout)

    @property
    def hidden_dim(self) -> int:
        """Number of features of the hidden layer."""
        last = self.last_layer
        return last.in_features

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that computes the residual from the hidden layer."""
        last = self.layers[-1]
        last = last.down_proj if isinstance(last, SwiGLU) else last
        assert isinstance(last, nn.Linear)
        return last

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Return the residual of `x`. It does not depend on the other arguments."""
        return self.dropout(chunked(self.layers, x, self.num_chunks))

    def extra_repr(self) -> str:
        """Return the number of chunks for `repr`, if there are several."""
        return f"num_chunks={self.num_chunks}" if self.num_chunks > 1 else ""


class LayerResidual(nn.Module):
    """The residual function of a whole layer, attention and then a perceptron: `f(x) + g(x + f(x))`.

    An ordinary transformer adds it to its input. The midpoint and leapfrog forms add it to another stream.

    Args:
        f: Residual function of the attention.
        g: Residual function of the perceptron.

    Shape:
        x: (B, T, D). Output: the same.
    """

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the residual of `x`. The other arguments are for the attention."""
        residual = self.f(x, **kwargs)
        result: Tensor = residual + self.g(x + residual)
        return result
