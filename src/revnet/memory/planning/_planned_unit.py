"""Parts of a `Plan`."""

from dataclasses import dataclass
from typing import NamedTuple

from revnet.nn import AbstractPolicy


class PlanPoint(NamedTuple):
    """Memory and time of one way to run the step."""

    peak_bytes: int
    """Largest number of bytes alive at once, everything counted."""
    time_ratio: float
    """Time of the step, relative to a step that stores all activations."""


@dataclass(frozen=True)
class PlannedUnit:
    """Policy that a plan chose for one unit, and the costs that decided it."""

    name: str
    """Name in the model, such as "stages.1.reversible.blocks.3"."""
    holder: str
    """Name of the module that holds its policy."""
    index: int
    """Index among the units of that module."""
    policy: AbstractPolicy
    held_bytes: int
    """Bytes that the unit holds between the passes under this policy."""
    stored_bytes: int
    """Bytes that it would hold if it stored all its activations."""
    extra_time: float
    """Time that the policy adds, as a fraction of a step that stores all activations."""
    most_extra_time: float
    """Time that the slowest of its policies would add, as the same fraction."""
