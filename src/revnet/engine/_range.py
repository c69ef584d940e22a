"""The range in which an exact coupling can be undone, checked on the streams."""

import math

import torch
from torch import Tensor

from revnet.engine._chain import HalfBlock
from revnet.engine._tensors import has_values, largest_element
from revnet.errors import ReconstructionError


def check_magnitude(half_block: HalfBlock, y: Tensor) -> None:
    """Raise if a stream that the half-block has just updated left the range; see `check_range`."""
    if half_block.coupling.is_exact and has_values(y):
        check_range(half_block, float(largest_element(y)), y.dtype)


def check_range(half_block: HalfBlock, magnitude: float, dtype: torch.dtype) -> None:
    """Raise if a stream left the range in which the half-block can be undone exactly.

    Raises:
        ReconstructionError: The stream left the range. NaN and infinity do not count, since the model made those.
    """
    limit = half_block.coupling.limit(dtype)
    if limit is not None and math.isfinite(magnitude) and magnitude >= limit:
        raise ReconstructionError(
            f"a stream reached {magnitude:,.5g} at `{half_block.name}`, beyond the {limit:,.5g} up to which "
            f"{half_block.coupling} is exact in {dtype}; {half_block.coupling.out_of_range_hint(magnitude, dtype)}, or "
            "normalise what the residual functions return."
        )
