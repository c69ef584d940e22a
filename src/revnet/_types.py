"""Aliases that several rooms share."""

from collections.abc import Callable

from torch import Tensor

TensorPair = tuple[Tensor, Tensor]
"""The two streams `(x1, x2)` of a reversible network."""

Streams = tuple[Tensor, ...]
"""The streams of a reversible network, two or more."""

ResidualFunction = Callable[..., Tensor]
"""What a reversible block adds to one stream, computed from the other: `f(x2, *args, **kwargs)`."""
