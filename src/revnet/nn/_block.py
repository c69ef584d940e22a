"""The reversible block."""

from typing import Any, overload

from torch import Tensor, nn

from revnet._types import TensorPair
from revnet.functional import AbstractCoupling, Additive, HalfBlock, call_within
from revnet.nn._policy import Reverse
from revnet.nn._run import run_forward, run_inverse

_ADDITIVE = Additive()


class ReversibleBlock(nn.Module):
    """Two residual functions, joined so that the input can be computed from the output.

    `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`; reversed, `x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`. Called alone, the block keeps
    its output and rebuilds the rest in the backward pass; several in a row belong in a `ReversibleSequential`, which
    keeps only the last output.

    Args:
        f: The residual function of the first stream: called with `x2` and the further arguments, it returns a tensor of
            `x1`'s shape. It may contain anything (dropout, batch norm, other devices), but must not write over its
            input.
        g: The residual function of the second stream: called with `y1`, returns a tensor of `x2`'s shape.
        split_dim: The dimension along which a tensor input is split into `x1, x2`.
        coupling: How residuals join the streams: `Additive()`, or `FixedPoint()` for a reversal that is exact to the
            last bit.

    Shape:
        x: a tensor, even along `split_dim`, for instance (B, C, H, W) with C even; or a pair of tensors. Output: the
            same.

    Raises:
        TypeError: `f` or `g` is no module.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7.
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, split_dim: int = 1, coupling: AbstractCoupling = _ADDITIVE):
        super().__init__()
        for name, function in (("f", f), ("g", g)):
            if not isinstance(function, nn.Module):
                raise TypeError(
                    f"`{name}` (={function!r}) must be an nn.Module, so that its parameters and buffers are known "
                    "when it runs again in the backward pass; wrap the function in a module."
                )
        if not isinstance(coupling, AbstractCoupling):
            raise TypeError(f"`coupling` (={coupling!r}) must be a coupling, such as `Additive()` or `FixedPoint()`.")
        self.f = f
        self.g = g
        self.coupling = coupling
        self.split_dim = split_dim

    @overload
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    @overload
    def forward(self, x: TensorPair, *args: Any, **kwargs: Any) -> TensorPair: ...

    def forward(self, x: Tensor | TensorPair, *args: Any, **kwargs: Any) -> Tensor | TensorPair:
        """Compute the block's output.

        Args:
            x: The activation, or the pair of streams. Not modified.
            args: Further positional arguments of both `f` and `g`.
            kwargs: Keyword arguments of both `f` and `g`.

        Returns:
            The output; a tensor for a tensor, a pair for a pair.
        """
        run = call_within(self)
        if run is not None:
            return run(x, args, kwargs)
        return run_forward([(Reverse(), self.half_blocks())], x, self.split_dim, args, kwargs)

    @overload
    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    @overload
    def inverse(self, y: TensorPair, *args: Any, **kwargs: Any) -> TensorPair: ...

    def inverse(self, y: Tensor | TensorPair, *args: Any, **kwargs: Any) -> Tensor | TensorPair:
        """Compute the input from the output `y`, with the further arguments that the forward pass had.

        Invert blocks with dropout in evaluation mode: in training mode it draws a new mask.
        """
        return run_inverse(self.half_blocks(), y, self.split_dim, args, kwargs)

    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """The two residual functions in order; `prefix` names the block in errors ("blocks.3.")."""
        return [
            HalfBlock(self.f, 0, f"{prefix}f", coupling=self.coupling),
            HalfBlock(self.g, 1, f"{prefix}g", coupling=self.coupling),
        ]

    def extra_repr(self) -> str:
        """The options that differ from the default, for `repr`."""
        options = [f"split_dim={self.split_dim}"] if self.split_dim != 1 else []
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
