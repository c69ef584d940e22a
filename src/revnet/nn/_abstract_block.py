"""The interface of reversible blocks: forward, inverse and log-determinant, all computed from half-blocks."""

import abc
from typing import Any, overload

import torch
from torch import Tensor, nn

from revnet._checks import describe, is_integer
from revnet._torch_internals import has_global_module_hook
from revnet._types import Streams, TensorPair
from revnet.coupling import AbstractCoupling
from revnet.engine import Chain, HalfBlock, call_within
from revnet.nn._policy import Reverse
from revnet.nn._run import run_forward, run_inverse, sum_log_dets

_REVERSE = Reverse()


class AbstractReversibleBlock(nn.Module, abc.ABC):
    """A module whose input can be computed from its output, as a chain of half-blocks.

    A subclass defines the residual functions of the block and the stream that each of them updates. A block that is
    called alone keeps its output and rebuilds the rest in the backward pass. Put several blocks in a row into a
    `ReversibleSequential`, which keeps only the last output.
    """

    split_dim: int
    """Dimension along which a tensor input is split into streams."""
    has_default_split_dim: bool = False
    """Whether `split_dim` was left out when the block was built, so that it is 1."""
    num_streams: int = 2
    """Number of streams."""

    @abc.abstractmethod
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the residual functions in order. `prefix`, such as "blocks.3.", names the block in errors."""

    def _chain(self) -> Chain:
        return Chain(self.half_blocks())

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
        check_default_split(self, x)
        return run_forward([(_REVERSE, self._chain())], x, self.split_dim, self.num_streams, args, kwargs)

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
        check_default_split(self, y)
        return run_inverse(self._chain(), y, self.split_dim, self.num_streams, args, kwargs)

    def forward_with_log_det(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> tuple[Tensor | Streams, Tensor]:
        """Compute the output, and the log-determinant of the map to it for each sample, (B,).

        Both are differentiable, and the activations are rebuilt in the backward pass as ever.

        Raises:
            ValueError: The block splits along the batch, so that a sample has no map of its own.
        """
        check_default_split(self, x)
        log_dets: list[Tensor] = []
        y = run_forward(
            [(_REVERSE, self._chain())], x, self.split_dim, self.num_streams, args, kwargs, log_dets=log_dets
        )
        return y, sum_log_dets(log_dets, y)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the residual functions, with the arguments of `torch.compile`; the block runs them uncompiled.

        A sequence runs the functions of its blocks and not the blocks, so that a compiled block would not be called.
        """
        for half_block in self.half_blocks():
            half_block.function.compile(*args, **kwargs)

    def log_det(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the log-determinant of the block at `x` alone, (B,)."""
        return self.forward_with_log_det(x, *args, **kwargs)[1]


def must_be_called(block: AbstractReversibleBlock) -> bool:
    """Return whether a call of the block does more than run its residual functions.

    It has hooks, or a `forward` of its own: a subclass's, or one that a tool has set on the instance.
    """
    return bool(
        block._forward_hooks
        or block._forward_pre_hooks
        or block._backward_hooks
        or block._backward_pre_hooks
        or type(block).forward is not AbstractReversibleBlock.forward
        or "forward" in block.__dict__
        or (not torch.compiler.is_dynamo_compiling() and has_global_module_hook())
    )


def choose_split_dim(split_dim: int | None) -> tuple[int, bool]:
    """Return the dimension to split, and whether it is the default.

    Raises:
        TypeError: `split_dim` is neither an integer nor None.
    """
    if split_dim is None:
        return 1, True
    if not is_integer(split_dim):
        raise TypeError(
            f"`split_dim` (={describe(split_dim)}) must be an integer, the dimension of the input to split: 1 for the "
            "channels of images, -1 for the features of sequences."
        )
    return split_dim, False


def check_default_split(block: AbstractReversibleBlock, x: Tensor | Streams) -> None:
    """Raise for a three-dimensional tensor that the block would split along the default dimension.

    Such a tensor is (B, C, L) or (B, T, D). Dimension 1 of the latter holds the tokens: splitting them runs without an
    error, but mixes tokens instead of features, and a causal model would see the future.

    Raises:
        ValueError: `x` has three dimensions, and the block was built without `split_dim`.
    """
    if isinstance(x, Tensor) and x.dim() == 3 and block.has_default_split_dim and block.split_dim == 1:
        raise ValueError(
            f"`split_dim` must be passed to {type(block).__name__} for a three-dimensional input (shape "
            f"{tuple(x.shape)}); pass `split_dim=-1` for (B, T, D), or `split_dim=1` for (B, C, L)."
        )


def check_functions(**functions: nn.Module) -> None:
    """Raise unless each residual function is a module."""
    for name, function in functions.items():
        if not isinstance(function, nn.Module):
            raise TypeError(
                f"`{name}` (={describe(function)}) must be an nn.Module, so that its parameters and buffers are known "
                "when it runs again in the backward pass; wrap the function in a module."
            )


def check_coupling(coupling: AbstractCoupling) -> None:
    """Raise unless `coupling` is a coupling."""
    if not isinstance(coupling, AbstractCoupling):
        raise TypeError(
            f"`coupling` (={describe(coupling)}) must be a coupling, such as `Additive()`, `FixedPoint()` or "
            "`Affine()`."
        )
