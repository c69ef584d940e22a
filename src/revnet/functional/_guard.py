"""Keyframes: where a run holds a pair of streams, so that what it rebuilds in between stays close to what was.

In the backward pass each function's input is compared, before it is used, with a sample that the forward pass took. If
it is too far off, the run goes forward again, from the nearest pair that is true, and goes on from the truth. That
place becomes a keyframe: the next forward pass holds the pair there, and nothing has to be done twice.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from revnet.errors import ReconstructionWarning

_INTERVAL = 100
"""Passes after which keyframes are placed anew."""
_PLACE_ABOVE = 0.25
_BROKEN_ABOVE = 0.5
"""Of the tolerance. A sample knows an error but roughly, so that it may not come nearer; keyframes are placed with some
room, so that they need not move at every step."""


class Guard:
    """Keeps the reconstruction error of runs below a bound, and knows their keyframes.

    Args:
        tolerance: The bound on the relative error of a rebuilt stream.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.keyframes: frozenset[str] = frozenset()
        """The half-blocks before which the pair of streams is held, by their names."""
        self._num_passes: dict[str, int] = {}
        self._has_warned = False

    def state(self) -> dict[str, Any]:
        """What it has learnt so far, of plain values: with it, another guard goes on as this one would."""
        return {
            "keyframes": sorted(self.keyframes),
            "num_passes": dict(self._num_passes),
            "has_warned": self._has_warned,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.keyframes = frozenset(state["keyframes"])
        self._num_passes = dict(state["num_passes"])
        self._has_warned = state["has_warned"]

    def begin(self, first_name: str) -> bool:
        """Count a pass through the run of that first half-block; whether it shall place its keyframes anew."""
        count = self._num_passes.get(first_name, 0)
        self._num_passes[first_name] = count + 1
        return count % _INTERVAL == 0

    def is_broken(self, error: float, *, is_placing: bool) -> bool:
        """Whether a sampled error is more than is let pass; NaN is."""
        return not error <= self.tolerance * (_PLACE_ABOVE if is_placing else _BROKEN_ABOVE)

    def forget(self, names: set[str]) -> None:
        """Drop keyframes, to be placed anew."""
        self.keyframes -= names

    def place(self, name: str) -> None:
        """Make a keyframe before the half-block of that name."""
        self.keyframes |= {name}

    def tell_alone(self, name: str, error: float) -> None:
        """Say, once, that one half-block alone breaks the bound."""
        if self._has_warned:
            return
        self._has_warned = True
        size = "NaN" if math.isnan(error) else f"{error:.1g}"
        warnings.warn(
            f"undoing `{name}` alone has a relative error of {size}, too near the tolerance of {self.tolerance:g} or "
            "beyond it, so that its stream is stored instead, there and wherever else it takes that; keep the streams "
            "in a higher precision, use `FixedPoint()`, or see with `revnet doctor` why it amplifies rounding.",
            ReconstructionWarning,
            stacklevel=2,
        )
