"""Aliases that several rooms share."""

from torch import Tensor

TensorPair = tuple[Tensor, Tensor]
"""The two streams `(x1, x2)` of a reversible network."""

Streams = tuple[Tensor, ...]
"""The streams of a reversible network, two or more."""
