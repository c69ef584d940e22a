"""Sources of the times in a plan: an estimate from shapes, or a measurement."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from revnet.memory.step._step_log import Integers


@dataclass(frozen=True, kw_only=True)
class RooflineTiming:
    """Time from the roofline model: an operation takes the longer of its arithmetic and its memory traffic.

    It needs only shapes and is deterministic. Plans compare times, so only the ratio of the two speeds matters. Real
    kernels differ, which makes the estimate rough; use `MeasuredTiming` if accuracy matters.

    Args:
        flops_per_byte: Floating-point operations that the device performs in the time in which it moves one byte to or
            from its memory.

    References:
        Williams, Waterman and Patterson (2009), Roofline: An Insightful Visual Performance Model.
    """

    flops_per_byte: float = 30.0

    def __post_init__(self) -> None:
        if not (isinstance(self.flops_per_byte, int | float) and 0 < self.flops_per_byte < float("inf")):
            raise ValueError(
                f"`flops_per_byte` (={self.flops_per_byte!r}) must be above 0; 30 is usual for a CPU, 30 to 300 for a "
                "GPU."
            )

    def seconds(self, flops: Integers, moved_bytes: Integers) -> npt.NDArray[np.float64]:
        """Return the time of each operation, in seconds on a device that moves 100 GB/s."""
        return np.maximum(flops / self.flops_per_byte, moved_bytes) / 100e9

    def describe(self) -> str:
        """Return a phrase for the source of the times."""
        return "estimated from shapes"


@dataclass(frozen=True, kw_only=True)
class MeasuredTiming:
    """Time from the clock: steps run on the model's device under each policy in turn.

    The model is left unchanged. If a step that stores all activations does not fit the device's free memory, a smaller
    batch is timed.

    Args:
        num_rounds: Steps under each policy, after a first one that does not count. Each unit gets its shortest time,
            and units of the same shape get their median. No policy counts as faster than storing.
    """

    num_rounds: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.num_rounds, int) or self.num_rounds < 1:
            raise ValueError(f"`num_rounds` (={self.num_rounds!r}) must be a positive integer.")

    def describe(self) -> str:
        """Return a phrase for the source of the times."""
        return "timed"


Timing = RooflineTiming | MeasuredTiming
