"""What every reversible block offers: forward, inverse and log-determinant, all from its half-blocks."""

import abc
from typing import Any, overload

from torch import Tensor, nn

from revnet._types import Streams, TensorPair
from revnet.coupling import AbstractCoupling
from revnet.functional import HalfBlock, call_within
from revnet.nn._policy import Reverse
from revnet.nn._run import run_forward, run_inverse, sum_log_dets


class AbstractReversibleBlock(nn.Module, abc.ABC):
    """A module whose input can be computed from its output, as a chain of half-blocks.

    A block says which residual functions it has, and which stream each one updates. Called alone, it keeps its output
    and rebuilds the rest in the backward pass; several in a row belong in a `ReversibleSequential`, which keeps only
    the last output.
    """

    split_dim: int
    """The dimension along which a tensor input is split into streams."""
    num_streams: int = 2
    """How many there are."""

    @abc.abstractmethod
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """The residual functions in order; `prefix` names the block in errors ("blocks.3.")."""

    @overload
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    @overload
    def forward(self, x: TensorPair, *args: Any, **kwargs: Any) -> TensorPair: ...
    @overload
    def forward(self, x: Streams, *args: Any, **kwargs: Any) -> Streams: ...

    def forward(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor | Streams:
        """Compute the block's output.

        Args:
            x: The activation, or the streams. Not modified.
            args: Further positional arguments of the residual functions.
            kwargs: Keyword arguments of the residual functions.

        Returns:
            The output; a tensor for a tensor, a tuple for a tuple.
        """
        run = call_within(self)
        if run is not None:
            return run(x, args, kwargs)
        return run_forward([(Reverse(), self.half_blocks())], x, self.split_dim, self.num_streams, args, kwargs)

    @overload
    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    @overload
    def inverse(self, y: TensorPair, *args: Any, **kwargs: Any) -> TensorPair: ...
    @overload
    def inverse(self, y: Streams, *args: Any, **kwargs: Any) -> Streams: ...

    def inverse(self, y: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor | Streams:
        """Compute the input from the output `y`, with the further arguments that the forward pass had.

        Invert blocks with dropout in evaluation mode: in training mode it draws a new mask.
        """
        return run_inverse(self.half_blocks(), y, self.split_dim, self.num_streams, args, kwargs)

    def forward_with_log_det(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> tuple[Tensor | Streams, Tensor]:
        """Compute the output, and the log-determinant of the map to it for each sample, (B,).

        Both are differentiable, and the activations are rebuilt in the backward pass as ever.

        Raises:
            ValueError: The block splits along the batch, so that a sample has no map of its own.
        """
        log_dets: list[Tensor] = []
        y = run_forward([(Reverse(), self.half_blocks())], x, self.split_dim, self.num_streams, args, kwargs, log_dets)
        return y, sum_log_dets(log_dets, y)

    def log_det(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the log-determinant of the block at `x` alone, (B,)."""
        return self.forward_with_log_det(x, *args, **kwargs)[1]


def check_functions(**functions: nn.Module) -> None:
    """Raise unless each residual function is a module."""
    for name, function in functions.items():
        if not isinstance(function, nn.Module):
            raise TypeError(
                f"`{name}` (={function!r}) must be an nn.Module, so that its parameters and buffers are known when it "
                "runs again in the backward pass; wrap the function in a module."
            )


def check_coupling(coupling: AbstractCoupling) -> None:
    """Raise unless it is a coupling."""
    if not isinstance(coupling, AbstractCoupling):
        raise TypeError(f"`coupling` (={coupling!r}) must be a coupling, such as `Additive()` or `Affine()`.")
