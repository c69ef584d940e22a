"""The interface of couplings, which combine a residual with a stream and separate the two again."""

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor


class AbstractCoupling(abc.ABC):
    """A rule that combines a residual with a stream so that the stream can be computed back.

    A coupling is one half of a reversible block. Subclasses are frozen dataclasses, so two couplings of one class with
    equal fields are equal. A class that defines `forward` must also define `is_additive`.

    Raises:
        TypeError: On the definition of a subclass that has a `forward` but does not define `is_additive`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock
        >>> from revnet.coupling import AbstractCoupling
        >>> class Subtractive(AbstractCoupling):
        ...     is_additive = False
        ...     def prepare(self, x):
        ...         return x
        ...     def forward(self, x, residual, name="f"):
        ...         return x - residual
        ...     def inverse(self, y, residual, name="f", *, in_place=False):
        ...         return y + residual
        ...     def log_det(self, x, residual):
        ...         return None
        ...     def limit(self, dtype):
        ...         return None
        >>> f, g, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.rand(3, 4)
        >>> block = ReversibleBlock(f, g, coupling=Subtractive())
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    is_additive: ClassVar[bool]
    """Whether the coupling is additive: the output's gradient is passed unchanged to both inputs, and the
    log-determinant is zero. It has no default, because a wrong value gives wrong gradients without an error."""
    is_linear: ClassVar[bool] = False
    """Whether `forward` multiplies its tensors only by constants and draws no random numbers, so that autograd saves
    none of them. The reversible run then needs no gradient of the coupling. Every additive coupling is linear."""
    is_exact: ClassVar[bool] = False
    """Whether the inverse is exact to the last bit while streams stay below `limit`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "is_additive" in vars(cls) and "is_linear" not in vars(cls):
            cls.is_linear = cls.is_additive  # A base class described another `forward`.
        forward = next(position for position, base in enumerate(cls.__mro__) if "forward" in vars(base))
        if cls.__mro__[forward] is AbstractCoupling:
            return  # Still abstract.
        # The class with this `forward`, or a subclass of it, must define it; a base class described another `forward`.
        if not any("is_additive" in vars(base) for base in cls.__mro__[: forward + 1]):
            raise TypeError(
                f"{cls.__name__} defines `forward`, so it must define `is_additive` too: True if gradients pass "
                "unchanged to both inputs, as they do for a sum, else False."
            )

    @property
    def mixes(self) -> bool:
        """Whether `mix` changes the output of the residual function."""
        return False

    def mix(self, source: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return the residual that is combined with the stream, from the output of the residual function.

        Args:
            source: The stream that the function read. Not modified.
            residual: The output of the function.
            name: The name of the residual function, for error messages.
        """
        return residual

    @property
    def grid(self) -> object:
        """Numbers that the streams can hold, for comparison: all couplings of an exact sequence must agree on them."""
        return self

    @property
    def draws(self) -> bool:
        """Whether the coupling draws random numbers or depends on the mode. A call then uses what `drawn` returns."""
        return False

    def drawn(self, x: Tensor, *, training: bool) -> "AbstractCoupling":
        """Return the coupling of a single call. Every run of this call, replays included, uses it.

        Args:
            x: The stream that will be updated. Only its shape and its device are read.
            training: Whether the residual function is in training mode.
        """
        return self

    @property
    def remembers(self) -> bool:
        """Whether `inverse` needs something of the stream that only the forward pass has.

        Reversible runs then call `forward_keeping` and `inverse_kept`, and hold what is kept.
        """
        return False

    def forward_keeping(self, x: Tensor, residual: Tensor, name: str = "f") -> tuple[Tensor, Tensor | None]:
        """Return what `forward` returns, and what `inverse_kept` needs; None for nothing."""
        return self.forward(x, residual, name), None

    def inverse_kept(
        self, y: Tensor, residual: Tensor, kept: Tensor | None, name: str = "f", *, in_place: bool = False
    ) -> Tensor:
        """Compute the stream as `inverse` does, from what `forward_keeping` kept."""
        return self.inverse(y, residual, name, in_place=in_place)

    @abc.abstractmethod
    def prepare(self, x: Tensor) -> Tensor:
        """Prepare a stream for its first residual.

        Residual functions still read the stream in the dtype of `x`, even if the prepared stream is wider.
        """

    @abc.abstractmethod
    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Combine a residual with the stream.

        Args:
            x: The stream. Not modified.
            residual: The output of the residual function. Most couplings require the shape of `x`. Its dtype must
                promote to the dtype of `x`.
            name: The name of the residual function, for error messages.

        Raises:
            TypeError: `residual` is not a tensor, or its dtype would change the dtype of the stream.
            ValueError: `residual` has a shape that does not fit the stream.
        """

    @abc.abstractmethod
    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Compute the stream that `forward` combined with the residual.

        Args:
            y: The result of `forward`. With `in_place`, it is overwritten and returned.
            residual: The residual passed to `forward`.
            name: The name of the residual function, for error messages.
            in_place: Whether to write the result into `y`. Use it only if nothing else reads `y`.
        """

    @abc.abstractmethod
    def log_det(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """Compute the log-determinant of `x -> y` at a fixed residual, for each sample.

        It is called only if `is_additive` is False.

        Returns:
            A tensor of shape (B,), or None if the log-determinant is zero for every sample.
        """

    @abc.abstractmethod
    def limit(self, dtype: torch.dtype) -> float | None:
        """Return the magnitude below which a stream of this dtype is reversed exactly.

        Returns:
            The limit, or None if reversal is not exact at any magnitude.
        """

    def out_of_range_hint(self, magnitude: float, dtype: torch.dtype) -> str:
        """Return advice for the error raised when a stream of this dtype reaches `magnitude`, beyond `limit`."""
        return "use a coupling of a wider range"
