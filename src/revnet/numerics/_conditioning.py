"""Penalty that keeps both a reversible map and its inverse from amplifying small changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revnet._checks import check_count, check_positive_number, check_step_arguments, describe, is_number
from revnet._types import Streams
from revnet.engine import Chain, HalfBlock
from revnet.nn import AbstractReversibleBlock, Reverse, ReversibleSequential
from revnet.nn.blocks._abstract_block import schedule_of
from revnet.nn.blocks._reversible_module import run_forward


def conditioning_penalty(
    sequence: ReversibleSequential,
    x: Tensor | Streams,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    forward_weight: float = 1.0,
    inverse_weight: float = 1.0,
    step: float = 0.1,
    num_blocks: int | None = None,
) -> Tensor:
    """Return a penalty on how much `sequence` and its inverse amplify small changes at `x`, to be added to the loss.

    With F the map of the sequence, the penalty is the mean over samples of
    `forward_weight * |F(x + step v) - F(x)|^2 / step^2 + inverse_weight * |F^-1(F(x) + step w) - x|^2 / step^2`, where
    v and w are random directions of length 1 for each sample. As `step` goes to zero, the two terms become the mean
    square of the singular values of the Jacobians of F and of its inverse; an isometry has 1. The backward pass
    multiplies rounding errors by the amplification of the inverse.

    The penalty costs two more forward passes, one of them of the inverse, and their gradients. Its authors apply it at
    every tenth update. It changes what the network learns; prefer `FixedPoint()` or a tolerance if that is unwanted.

    Args:
        sequence: The reversible part of a model. Its functions must not draw random numbers.
        x: Input of the sequence, a tensor or a tuple, ideally from training. Gradients flow into it too.
        args: Additional positional arguments of the residual functions.
        kwargs: Keyword arguments of the residual functions.
        forward_weight: Weight of the term of F; 0 leaves it out.
        inverse_weight: Weight of the term of the inverse; 0 leaves it out.
        step: Length of the change of each sample.
        num_blocks: Number of consecutive blocks, chosen at random, to apply the penalty to; None for all. Use few, even
            1, if the whole sequence amplifies so much that a change of `step` does not stay small. The gradient then
            does not reach `x`.

    Returns:
        The penalty, a scalar, differentiable in the parameters and in `x`.

    Raises:
        TypeError: `sequence` is not a ReversibleSequential.
        ValueError: A weight is negative, `step` is not positive, or a dropout is in training mode, in which every pass
            would run a different network.

    Numerics:
        The activations of all passes are rebuilt, so memory does not grow with depth. With couplings that multiply,
        such as `Affine()`, the activations of the inverse are stored. Buffers, such as batch-norm statistics, do not
        change.

    References:
        Behrmann, Vicol, Wang, Grosse and Jacobsen (2021), Understanding and Mitigating Exploding Inverses in Invertible
            Neural Networks, section 4: bi-directional finite-difference regularization.
    """
    _check(sequence, kwargs, forward_weight, inverse_weight, step, num_blocks)
    keywords = dict(kwargs or {})
    if num_blocks is not None and num_blocks < len(sequence):
        start = int(torch.randint(len(sequence) - num_blocks + 1, ()))
        with torch.no_grad():
            x = _call(sequence[:start], x, args, keywords)
        sequence = sequence[start : start + num_blocks]
    y = _call(sequence, x, args, keywords)
    penalty = torch.zeros((), device=_streams(y)[0].device, dtype=_real_dtype(_streams(y)[0]))
    if forward_weight:
        moved = _call(sequence, _moved(x, step), args, keywords)
        penalty = penalty + forward_weight * _mean_square(moved, y) / step**2
    if inverse_weight:
        back = _call(_Inverse(sequence), _moved(y, step), args, keywords)
        penalty = penalty + inverse_weight * _mean_square(back, x) / step**2
    return penalty


def _check(
    sequence: ReversibleSequential,
    kwargs: Mapping[str, Any] | None,
    forward_weight: float,
    inverse_weight: float,
    step: float,
    num_blocks: int | None,
) -> None:
    if not isinstance(sequence, ReversibleSequential):
        raise TypeError(
            f"`sequence` (={type(sequence).__name__}) must be a ReversibleSequential, such as a part of the model."
        )
    check_step_arguments(sequence, kwargs, None, None)
    for name, weight in (("forward_weight", forward_weight), ("inverse_weight", inverse_weight)):
        if not is_number(weight) or weight < 0:
            raise ValueError(f"`{name}` (={describe(weight)}) must be a number from 0 up; 1e-4 of the loss is usual.")
    if num_blocks is not None:
        check_count("num_blocks", num_blocks)
    check_positive_number("step", step, hint="0.1 is usual")
    for name, module in sequence.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"`sequence` has dropout in training mode, `{name}`, so every pass runs a different network; compute "
                "the penalty in evaluation mode, or without dropout."
            )


def _call(module: nn.Module, x: Tensor | Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `module` on copies of its buffers, so that its statistics only count training steps."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return torch.func.functional_call(module, buffers, (x, *args), kwargs)


class _Inverse(nn.Module):
    """Inverse of a sequence.

    With additive couplings it is itself a reversible map, which adds the negative residuals in reverse order.
    """

    def __init__(self, sequence: ReversibleSequential):
        super().__init__()
        self.sequence = sequence

    def forward(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        half_blocks: list[HalfBlock] = []
        first: AbstractReversibleBlock | None = None
        for index, block in enumerate(self.sequence):
            assert isinstance(block, AbstractReversibleBlock)
            first = block if first is None else first
            half_blocks += block.half_blocks(f"blocks.{index}.")
        if first is None or not all(half_block.coupling.is_additive for half_block in half_blocks):
            return self.sequence.inverse(y, *args, **kwargs)
        undone = [half_block._replace(function=_Negative(half_block.function)) for half_block in reversed(half_blocks)]
        chain = Chain(undone)
        chain.num_runs = 1  # The first run of a chain on a GPU waits for it, and this chain is a new one in each step.
        return run_forward(schedule_of([(Reverse(), chain)], first), y, args, kwargs)


class _Negative(nn.Module):
    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -self.function(*args, **kwargs)


# Streams, joined or separate ------------------------------------------------------------------------------------------


def _streams(x: Tensor | Streams) -> Sequence[Tensor]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def _moved(x: Tensor | Streams, step: float) -> Any:
    """Return `x` with each sample moved by `step` in a random direction."""
    streams = _streams(x)
    noise = [torch.randn_like(stream) for stream in streams]
    lengths = sum(_squares(part) for part in noise).sqrt()  # type: ignore[union-attr]
    moved = [
        stream + step * part / lengths.view(-1, *[1] * (part.dim() - 1))
        for stream, part in zip(streams, noise, strict=True)
    ]
    return moved[0] if isinstance(x, Tensor) else tuple(moved)


def _mean_square(a: Tensor | Streams, b: Tensor | Streams) -> Tensor:
    """Return the mean squared distance of a sample."""
    distances = [_squares(p - q) for p, q in zip(_streams(a), _streams(b), strict=True)]
    return torch.stack([distance.mean() for distance in distances]).sum()


def _squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each sample."""
    return (torch.view_as_real(x) if x.is_complex() else x).square().flatten(1).sum(1)


def _real_dtype(x: Tensor) -> torch.dtype:
    return x.real.dtype if x.is_complex() else x.dtype
