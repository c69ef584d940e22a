"""How a residual joins a stream, and comes off it again; and the two streams.

One half of a reversible block: `y = x + residual`, undone by `x = y - residual` (Gomez et al. 2017, equations 6 and 7;
Dinh et al. 2015, NICE).
"""

import abc
from dataclasses import dataclass, fields
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from revnet._types import Streams, TensorPair


class AbstractCoupling(abc.ABC):
    """Joins residuals to a stream such that they can be taken off again.

    Couplings are frozen dataclasses: those of equal fields are equal.
    """

    passes_gradients: ClassVar[bool] = True
    """Whether the gradient of the joined stream is that of the stream and that of the residual, as it is; volumes then
    stay as they are, too."""
    is_exact: ClassVar[bool] = False
    """Whether reversal loses nothing, as long as streams stay below their `limit`."""
    number: int
    """By which code traced by `torch.compile` knows it: the trace can hold and watch a number, but no object."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", _NUMBERS.setdefault(self, len(_NUMBERS)))

    def __reduce__(self) -> Any:
        # Made anew, since numbers hold in one process only.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    @classmethod
    def of_number(cls, number: int) -> "AbstractCoupling":
        """The coupling of that `number`."""
        return next(coupling for coupling, its_number in _NUMBERS.items() if its_number == number)

    @abc.abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """The stream, made ready for its first residual; functions read it in the type that `x` has."""

    @abc.abstractmethod
    def join(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """The stream with a residual.

        Args:
            x: The stream. Not modified.
            residual: What the residual function returned; the same shape, and a dtype that `x` can hold.
            name: The residual function's name, for errors.

        Raises:
            TypeError: `residual` is no tensor, or its dtype would change the stream's.
            ValueError: `residual` has another shape.
        """

    @abc.abstractmethod
    def part(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """The stream without the residual that `join` gave it.

        Args:
            y: The stream. Modified, and returned, if `in_place`.
            residual: The residual.
            name: The residual function's name, for errors.
            in_place: Write the result over `y`, for callers that own it.
        """

    @abc.abstractmethod
    def log_det(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """The log-determinant of `x -> y` at a fixed residual, for each sample of the batch: (B,).

        None where it is zero for all. Only asked for if gradients do not pass as they are.
        """

    @abc.abstractmethod
    def limit(self, dtype: torch.dtype) -> float | None:
        """The magnitude that a stream of this type must not reach, for reversal to be exact; None if it never is."""

    def way_out(self, magnitude: float, dtype: torch.dtype) -> str:
        """What to do about a stream of this type that reached `magnitude`, beyond the limit."""
        return "use a coupling of a wider range"


_NUMBERS: dict[AbstractCoupling, int] = {}


@dataclass(frozen=True)
class Additive(AbstractCoupling):
    """`y = x + residual` in floating point: the paper's coupling, and the default.

    Accuracy: what comes back is the old stream up to half a unit in the last place, at every block.
    """

    def enter(self, x: Tensor) -> Tensor:
        """The stream as it is."""
        return x

    def join(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """`x + residual`."""
        return additive(x, residual, name)

    def part(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """`y - residual`."""
        return additive_inverse(y, residual, name, in_place=in_place)

    def log_det(self, x: Tensor, residual: Tensor) -> None:
        """None: volumes stay as they are."""

    def limit(self, dtype: torch.dtype) -> None:
        """None: there is rounding at every magnitude."""


@overload
def split(x: Tensor | TensorPair, dim: int) -> TensorPair: ...
@overload
def split(x: Tensor | Streams, dim: int, num_streams: int) -> Streams: ...


def split(x: Tensor | Streams, dim: int, num_streams: int = 2) -> Streams:
    """Split `x` into its streams, equal parts along `dim`; a pair, or a tuple of as many, is taken as it is.

    Args:
        x: An activation whose size along `dim` can be divided, or the streams `(x1, x2)`.
        dim: The dimension to split; 1 for the channels of images, -1 for the features of sequences.
        num_streams: How many streams.

    Returns:
        `(x1, x2)`. Parts of a tensor are copies laid out densely: residual functions run on them many times, and
        kernels are slower on a strided view, or even round differently.

    Raises:
        TypeError: `x` is neither a tensor nor as many tensors, or is not floating-point.
        ValueError: `x` has no dimension `dim`, or a size along it that cannot be divided.
    """
    if isinstance(x, Tensor):
        _check_stream("x", x)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(
                f"`split_dim` (={dim}) must be a dimension of the input, which has shape {tuple(x.shape)}; "
                f"pass one from {-x.dim()} to {x.dim() - 1}."
            )
        size = x.shape[dim]
        if size % num_streams:
            must = "even" if num_streams == 2 else f"a multiple of {num_streams}"
            raise ValueError(
                f"`x` has size {size} along dimension {dim} (shape {tuple(x.shape)}), which must be {must}, since a "
                f"reversible block splits it in {_names(num_streams)[0]}; use "
                f"{-(-size // num_streams) * num_streams} channels, or pass {_names(num_streams)[1]}."
            )
        return tuple([part.clone() for part in x.chunk(num_streams, dim)])
    if not isinstance(x, (tuple, list)) or len(x) != num_streams:
        raise TypeError(
            f"`x` (={_describe(x)}) must be a tensor, which is split in {_names(num_streams)[0]}, or "
            f"{_names(num_streams)[1]}."
        )
    for index, stream in enumerate(x):
        _check_stream(f"x{index + 1}", stream)
    return tuple(x)


def _names(num_streams: int) -> tuple[str, str]:
    """In how many parts a tensor is split, and what may be passed in its place."""
    return ("two", "a pair of tensors (x1, x2)") if num_streams == 2 else (f"{num_streams}", f"{num_streams} tensors")


def additive(x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
    """Add a residual to a stream: `y = x + residual`.

    Args:
        x: The stream. Not modified.
        residual: What the residual function returned; the same shape, and a dtype that `x` can hold.
        name: The residual function's name, for the error.

    Returns:
        `y`, with the shape and dtype of `x`.

    Raises:
        TypeError: `residual` is no tensor, or its dtype would change the stream's.
        ValueError: `residual` has another shape.
    """
    check_residual(x, residual, name)
    return x + residual


def additive_inverse(y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
    """Take a residual off a stream again: `x = y - residual`.

    Args:
        y: The stream. Modified, and returned, if `in_place`.
        residual: The residual that `additive` added.
        name: The residual function's name, for the error.
        in_place: Write the result over `y`, for callers that own it: nothing is allocated.

    Numerics:
        Floating-point addition rounds, so this returns the old `x` up to half a unit in the last place of `y`.
    """
    check_residual(y, residual, name)
    return y.sub_(residual) if in_place else y - residual


def check_residual(x: Tensor, residual: Tensor, name: str) -> None:
    """Raise unless a residual can join the stream `x`."""
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"`{name}` returned {_describe(residual)}, but must return one tensor, which is added to a stream."
        )
    if residual.shape != x.shape:
        raise ValueError(
            f"`{name}` returned shape {tuple(residual.shape)}, but must return the shape of the stream to which it is "
            f"added, {tuple(x.shape)}; a block that changes the shape is not reversible: put it between two sequences."
        )
    if torch.promote_types(x.dtype, residual.dtype) != x.dtype:
        raise TypeError(
            f"`{name}` returned {residual.dtype}, but the stream to which it is added is {x.dtype}, which would change "
            f"and could not be rebuilt; cast the stream up with `x.to({residual.dtype})`, or the residual down."
        )


def _check_stream(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` (={_describe(x)}) must be a tensor.")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"`{name}` has dtype {x.dtype}, but a stream must be floating-point; convert it with `x.float()`."
        )


def _describe(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
