"""A flow with several scales, each of which splits off half of its features as a part of the code."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revnet._checks import check_tensor, describe, describe_kind
from revnet.nn.invertible._abstract_invertible import AbstractInvertible, zero_log_det


class MultiScaleSequential(nn.Module):
    """Run scales in order, and factor out half of the channels after each of them but the last.

    Of the output of a scale, the first half of the channels goes on to the next scale, and the second half is a part of
    the code. The later scales of a flow then have fewer features and cost less. The whole map is a bijection from the
    input to a tuple of tensors that together have as many elements, so it has an inverse and a log-determinant.

    A scale keeps its output for the backward pass if it is an `InvertibleSequential` of one run of blocks. So memory
    grows with the number of scales, and not with the depth of a scale.

    Args:
        scales: Invertible layers or networks, such as `InvertibleSequential(SpaceToDepth(), *steps)`. All but the last
            return an even number of channels.

    Shape:
        x: A tensor that the first scale accepts. Output: a tuple with one tensor for each scale, (B, C, ...).

    Raises:
        TypeError: A scale is not invertible. In the passes: the input is not a tensor, or the codes are not tensors.
        ValueError: `scales` is empty. In the passes: a scale returns an odd number of channels, or the number of codes
            is not the number of scales.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP, section 3.6, equations 13 to 16.

    Example:
        >>> import torch
        >>> from revnet.nn import HaarWavelet, InvertibleSequential, MultiScaleSequential
        >>> scales = [InvertibleSequential(HaarWavelet()) for _ in range(2)]
        >>> flow, x = MultiScaleSequential(*scales), torch.rand(1, 1, 4, 4)
        >>> codes = flow(x)
        >>> [tuple(code.shape) for code in codes]
        [(1, 2, 2, 2), (1, 8, 1, 1)]
        >>> torch.allclose(flow.inverse(codes), x)
        True
    """

    def __init__(self, *scales: AbstractInvertible):
        super().__init__()
        for index, scale in enumerate(scales):
            if not isinstance(scale, AbstractInvertible):
                raise TypeError(
                    f"`scales[{index}]` (={describe(scale)}) must be an invertible layer; put the blocks of a scale "
                    "into an `InvertibleSequential`."
                )
        if not scales:
            raise ValueError("`scales` must hold at least one scale, such as `InvertibleSequential(*blocks)`.")
        self.scales = nn.ModuleList(scales)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Compute the codes of all scales, the finest first.

        Args:
            x: The input.
            args: Additional positional arguments of every residual function, such as a context.
            kwargs: Additional keyword arguments, as for `InvertibleSequential`.
        """
        check_tensor("x", x)
        codes: list[Tensor] = []
        for index, scale in enumerate(self.scales):
            x = scale(x, *args, **kwargs) if _takes_arguments(scale) else scale(x)
            x = self._split_off(index, x, codes)
        return tuple(codes)

    def inverse(self, codes: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the input from the codes. Pass the additional arguments that the forward pass had."""
        self._check_codes(codes)
        y = codes[-1]
        for index in reversed(range(len(self.scales))):
            scale: Any = self.scales[index]
            if index < len(self.scales) - 1:
                y = _join(y, codes[index], index)
            y = scale.inverse(y, *args, **kwargs) if _takes_arguments(scale) else scale.inverse(y)
        return y

    def forward_with_log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute the codes, and the log-determinant of the whole map for each sample, (B,)."""
        check_tensor("x", x)
        codes: list[Tensor] = []
        total = zero_log_det(x)
        for index in range(len(self.scales)):
            scale: Any = self.scales[index]
            run = scale.forward_with_log_det
            x, log_det = run(x, *args, **kwargs) if _takes_arguments(scale) else run(x)
            total = total + log_det
            x = self._split_off(index, x, codes)
        return tuple(codes), total

    def log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the log-determinant at `x` for each sample, (B,)."""
        return self.forward_with_log_det(x, *args, **kwargs)[1]

    def _split_off(self, index: int, y: Tensor, codes: list[Tensor]) -> Tensor:
        """Append the part of a scale's output that is code to `codes`, and return the part that goes on."""
        if index == len(self.scales) - 1:
            codes.append(y)
            return y
        if y.dim() < 2 or y.shape[1] % 2 or not y.shape[1]:
            raise ValueError(
                f"`scales[{index}]` returned shape {tuple(y.shape)}, but must return an even number of channels, half "
                "of which are split off; put a `SpaceToDepth` into the scale."
            )
        rest, code = y.chunk(2, 1)
        codes.append(code)
        return rest

    def _check_codes(self, codes: Any) -> None:
        if not isinstance(codes, tuple | list):
            raise TypeError(
                f"`codes` (={describe(codes)}) must be a tuple with one tensor for each scale, as `forward` returns it."
            )
        if len(codes) != len(self.scales):
            raise ValueError(
                f"`codes` (={describe_kind(codes)}) must hold one tensor for each of the {len(self.scales)} scales, as "
                "`forward` returns them."
            )
        for index, code in enumerate(codes):
            check_tensor(f"codes[{index}]", code, hint="pass what `forward` returned")


def _join(y: Tensor, code: Tensor, index: int) -> Tensor:
    if y.shape != code.shape:
        raise ValueError(
            f"`codes[{index}]` has shape {tuple(code.shape)}, but the later codes make {tuple(y.shape)}, and both "
            "halves must have one shape; pass what `forward` returned."
        )
    return torch.cat((y, code), 1)


def _takes_arguments(scale: Any) -> bool:
    return bool(scale.takes_arguments)
