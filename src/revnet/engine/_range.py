"""Check that streams stay in the range in which a coupling reverses them exactly."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revnet._torch_internals import HAS_ACCELERATOR, assert_async
from revnet.engine._capture import is_capturing
from revnet.engine._chain import HalfBlock
from revnet.engine._observer import Observer
from revnet.engine._tensors import has_values, largest_element
from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


class RangeWatch(Observer):
    """Observer that raises if a stream leaves the range of its exact coupling.

    On the CPU, it raises at once. On a GPU, it does not wait for the stream, and raises when the backward pass begins.
    In a CUDA graph, an assertion on the device fails.

    Args:
        is_captured: Whether the run is captured in a CUDA graph.
    """

    def __init__(self, *, is_captured: bool = False) -> None:
        self._is_captured = is_captured
        self._magnitudes: list[tuple[HalfBlock, Tensor]] = []

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Check the stream that half-block `index` has updated, and a stream that enters the chain and is rebuilt."""
        if index < len(streams) and (run.undoes_all or -1 < run.lowest < index) and is_bound_by_range(half_block):
            self.look(half_block, streams[half_block.target])
        self.look(half_block, y)

    def look(self, half_block: HalfBlock, y: Tensor) -> None:
        """Check a stream that a half-block has updated."""
        if not half_block.coupling.is_exact:
            return
        magnitude = largest_element(y)
        if self._is_captured:
            _assert_on_device(half_block, magnitude, y.dtype)
        elif y.device.type in ("cpu", "meta"):
            if has_values(y):
                # `tolist` gives a number; `float` would be one more operation than a prediction of the step has.
                value: Any = magnitude.tolist()
                check_range(half_block, value, y.dtype)
        else:
            self._magnitudes.append((half_block, magnitude))

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Check the streams for which the forward pass did not wait."""
        self.check_waiting()

    def check_waiting(self) -> None:
        """Check the streams for which the forward pass did not wait."""
        magnitudes, self._magnitudes = self._magnitudes, []
        if not magnitudes or not has_values(magnitudes[0][1]):
            return
        # One wait for all of them.
        values = torch.stack([magnitude for _, magnitude in magnitudes]).tolist()
        for (half_block, magnitude), value in zip(magnitudes, values, strict=True):
            check_range(half_block, value, magnitude.dtype)


def is_bound_by_range(half_block: HalfBlock) -> bool:
    """Return whether the half-block can only rebuild a stream in range. An addition can rebuild any on the grid."""
    return half_block.coupling.is_exact and not half_block.coupling.is_additive


def check_magnitude(half_block: HalfBlock, y: Tensor) -> None:
    """Raise if a stream that the half-block updates is out of range."""
    if not half_block.coupling.is_exact or not has_values(y):
        return
    if HAS_ACCELERATOR and is_capturing():
        _assert_on_device(half_block, largest_element(y), y.dtype)
    else:
        check_range(half_block, float(largest_element(y)), y.dtype)


def _assert_on_device(half_block: HalfBlock, magnitude: Tensor, dtype: torch.dtype) -> None:
    limit = half_block.coupling.limit(dtype)
    if limit is not None:
        # NaN and inf pass, as in `check_range`: the model produced them.
        assert_async(~(magnitude >= limit) | magnitude.isinf(), f"a stream reached {limit}: see FixedPoint")


def check_range(half_block: HalfBlock, magnitude: float, dtype: torch.dtype) -> None:
    """Raise if a stream left the range in which the half-block can be undone exactly.

    Raises:
        ReconstructionError: The stream is out of range. NaN and inf are not reported here, because the model produced
            them.
    """
    limit = half_block.coupling.limit(dtype)
    if limit is not None and math.isfinite(magnitude) and magnitude >= limit:
        raise ReconstructionError(
            f"a stream reached {magnitude:,.5g} at `{half_block.name}`, beyond the {limit:,.5g} up to which "
            f"{half_block.coupling} is exact in {dtype}; {half_block.coupling.out_of_range_hint(magnitude, dtype)}, or "
            "normalize the outputs of the residual functions."
        )
