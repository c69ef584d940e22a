"""Split a tensor into streams, with all checks and for every coupling; `_streams` has the usual case."""

from typing import overload

import torch
from torch import Tensor

from revnet._checks import describe, describe_kind
from revnet._torch_release import is_autocast_on
from revnet._types import Streams, TensorPair
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine._tensors import is_dense

MOST_STREAMS = 1_000_000


def prepare(
    x: Tensor | Streams, dim: int, num_streams: int, coupling: AbstractCoupling | None, *, name: str = "x"
) -> tuple[Streams, torch.dtype | None]:
    """Split `x`, and prepare its streams for their first residual.

    Under autocast, streams are float32, in which they can be rebuilt; the functions still compute in low precision.

    Returns:
        The streams, and the dtype in which functions read them, if it differs from the dtype of the streams.
    """
    streams = tuple(
        [stream.float() if is_low_precision(stream) else stream for stream in split(x, dim, num_streams, name=name)]
    )
    # Rebuilt streams are never lazily conjugated or negated, and the checks compare memory.
    streams = tuple([dense(stream.resolve_conj().resolve_neg()) for stream in streams])
    if coupling is None:
        return streams, None
    if type(coupling) is Additive:
        return streams, None
    prepared = tuple([coupling.prepare(stream) for stream in streams])
    if all(stream.dtype == new.dtype for stream, new in zip(streams, prepared, strict=True)):
        return prepared, None
    dtype = streams[0].dtype
    for index, stream in enumerate(streams):
        if stream.dtype != dtype:
            raise TypeError(
                f"`{name}{index + 1}` has dtype {stream.dtype}, but `{name}1` has {dtype}, and {coupling} computes in "
                f"{prepared[0].dtype} and returns the dtype of the input; convert the streams to one dtype."
            )
    return prepared, dtype


def dense(stream: Tensor) -> Tensor:
    """Return a stream without gaps and without shared elements, in the same order of dimensions.

    The sum with a residual is dense, and so is a rebuilt stream. On another layout, a function may run other operators,
    which save other tensors, and round differently.
    """
    is_usual = stream.layout is not torch.strided or stream.is_contiguous()
    return stream if is_usual or is_dense(stream) else stream.clone()


def is_low_precision(x: Tensor) -> bool:
    """Return whether autocast made `x` so imprecise that it could hardly be rebuilt as a stream."""
    return x.dtype in (torch.bfloat16, torch.float16) and is_autocast_on(x.device.type)


@overload
def split(x: Tensor | TensorPair, dim: int, *, name: str = "x") -> TensorPair: ...
@overload
def split(x: Tensor | Streams, dim: int, num_streams: int, *, name: str = "x") -> Streams: ...


def split(x: Tensor | Streams, dim: int, num_streams: int = 2, *, name: str = "x") -> Streams:
    """Split `x` into streams of equal size along `dim`.

    A pair of tensors, or a tuple or list of `num_streams` tensors, is already split and is returned unchanged, as a
    tuple.

    Args:
        x: An activation whose size along `dim` is divisible by `num_streams`, or the streams `(x1, x2)`.
        dim: The dimension to split: 1 for the channels of images, -1 for the features of sequences.
        num_streams: The number of streams.
        name: The name of the argument, for error messages.

    Returns:
        The streams `(x1, x2)`. The parts of a tensor are dense copies, because residual functions run on them many
        times, and kernels are slower on strided views and may round differently.

    Raises:
        TypeError: `x` is neither a tensor nor `num_streams` tensors, or is not floating-point. Or `dim` is not an
            integer.
        ValueError: `num_streams` is not an integer of at least 2, `x` has no dimension `dim`, or its size along `dim`
            is not divisible by `num_streams`.
    """
    if (
        type(num_streams) is not int or not 2 <= num_streams <= MOST_STREAMS
    ):  # Runs in every forward pass, so without a call; rejects bools.
        raise ValueError(f"`num_streams` (={describe(num_streams)}) must be an integer from 2 to {MOST_STREAMS:,}.")
    if type(dim) is not int:
        raise TypeError(f"`dim` (={describe(dim)}) must be an integer, the dimension to split.")
    if isinstance(x, Tensor):
        _check_stream(name, x)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(
                f"`split_dim` (={describe(dim)}) must be a dimension of `{name}`, which has shape {tuple(x.shape)}; "
                f"pass one from {-x.dim()} to {x.dim() - 1}."
            )
        size = x.shape[dim]
        if size % num_streams:
            must = "must be even" if num_streams == 2 else f"must be a multiple of `num_streams` (={num_streams})"
            raise ValueError(
                f"`{name}` (of shape {tuple(x.shape)}) has size {size} along `split_dim` (={dim}), which {must}, since "
                f"a reversible block splits it in {_names(num_streams)[0]}; use "
                f"{-(-size // num_streams) * num_streams} channels, or pass {_names(num_streams)[1]}."
            )
        return tuple([part.clone() for part in x.chunk(num_streams, dim)])
    if not isinstance(x, (tuple, list)) or len(x) != num_streams:
        raise TypeError(
            f"`{name}` (={describe_kind(x)}) must be a tensor, which is split in {_names(num_streams)[0]}, or "
            f"{_names(num_streams)[1]}."
        )
    for index, stream in enumerate(x):
        _check_stream(f"{name}{index + 1}", stream)
    return tuple(x)


def _names(num_streams: int) -> tuple[str, str]:
    """Return words for the number of streams, and for the tensors that may be passed instead of one tensor."""
    return ("two", "a pair of tensors (x1, x2)") if num_streams == 2 else (f"{num_streams}", f"{num_streams} tensors")


def _check_stream(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` (={describe_kind(x)}) must be a tensor.")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"`{name}` has dtype {x.dtype}, but a stream must be floating-point; convert it with `{name}.float()`."
        )
