"""Modules before and after a reversible sequence, for networks whose streams are copies of one tensor."""

from typing import Literal

import torch
from torch import Tensor, nn

from revnet._checks import check_choice, describe, describe_kind, is_integer
from revnet._types import Streams

Join = Literal["first", "last", "mean", "sum", "concatenate"]


class DuplicateStreams(nn.Module):
    """Return the input as several streams, so that each residual function sees the whole width of a network.

    Use it in front of a sequence whose blocks alternate between copies of the input, such as a two-step scheme of
    `revnet.coupling.Scaled`, `BDIA`, or a reversible transformer.

    Args:
        num_streams: The number of streams.

    Shape:
        x: Any tensor. Output: a tuple of `num_streams` references to it; no memory is copied.

    Raises:
        ValueError: `num_streams` is not an integer of at least 2.

    References:
        Kitaev, Kaiser and Levskaya (2020), Reformer: The Efficient Transformer, section 3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> from revnet.coupling import Scaled
        >>> from revnet.nn import DuplicateStreams, JoinStreams
        >>> f, g = nn.Linear(4, 4), nn.Linear(4, 4)
        >>> blocks = ReversibleSequential(ReversibleBlock(f, g, coupling=Scaled.midpoint()))
        >>> model = nn.Sequential(DuplicateStreams(), blocks, JoinStreams())
        >>> model(torch.rand(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(self, num_streams: int = 2):
        super().__init__()
        if not is_integer(num_streams) or num_streams < 2:
            raise ValueError(f"`num_streams` (={describe(num_streams)}) must be an integer of at least 2.")
        self.num_streams = num_streams

    def forward(self, x: Tensor) -> Streams:
        """Return `x` as several streams."""
        if not isinstance(x, Tensor):
            raise TypeError(f"`x` must be a tensor, which becomes {self.num_streams} streams, not {describe_kind(x)}.")
        return (x,) * self.num_streams

    def extra_repr(self) -> str:
        """Return the options that differ from the default, for `repr`."""
        return "" if self.num_streams == 2 else f"num_streams={self.num_streams}"


class JoinStreams(nn.Module):
    """Return one tensor from the streams at the end of a reversible sequence.

    Args:
        join: How. "last" returns the last stream, which is the newest value of a two-step scheme, and "first" the first
            one, which is the activation if the second stream is a velocity. "mean" and "sum" combine all streams, and
            "concatenate" puts them side by side.
        dim: The dimension for "concatenate".

    Shape:
        streams: A tuple of tensors of one shape. Output: a tensor of this shape; with "concatenate", `dim` is longer.

    Raises:
        TypeError: `dim` is not an integer. In the passes: the input is not a tuple of tensors.
        ValueError: `join` is unknown.

    Example:
        >>> import torch
        >>> from revnet.nn import JoinStreams
        >>> JoinStreams("mean")((torch.zeros(2), torch.ones(2)))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, join: Join = "last", *, dim: int = 1):
        super().__init__()
        check_choice("join", join, ("first", "last", "mean", "sum", "concatenate"))
        if not is_integer(dim):
            raise TypeError(f"`dim` (={describe(dim)}) must be an integer, the dimension along which to concatenate.")
        self.join: Join = join
        self.dim = dim

    def forward(self, streams: Streams) -> Tensor:
        """Return one tensor."""
        is_usable = isinstance(streams, tuple | list) and len(streams) > 0
        if not is_usable or not all(isinstance(stream, Tensor) for stream in streams):
            raise TypeError(
                f"`streams` must be a tuple of tensors, not {describe_kind(streams)}; a sequence returns one if its "
                "input is one: put `DuplicateStreams()` in front of it."
            )
        if self.join in ("first", "last"):
            return streams[0 if self.join == "first" else -1]
        if self.join == "concatenate":
            return torch.cat(list(streams), self.dim)
        total = sum(streams[1:], start=streams[0])
        return total / len(streams) if self.join == "mean" else total

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"{self.join!r}" + (f", dim={self.dim}" if self.join == "concatenate" else "")
