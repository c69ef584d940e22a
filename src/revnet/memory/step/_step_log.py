"""Log of the memory of one training step, event by event."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

Integers = NDArray[np.int64]

NO_MODULE = -1
"""Placeholder for a module's index where no module ran, such as in the loss."""


@dataclass(eq=False, slots=True)
class Call:
    """One call of a module in the forward pass."""

    name: str
    """First name of the module in `named_modules`."""
    module: nn.Module
    start_event: int
    stop_event: int
    """First event after the call."""
    start_sequence: int
    stop_sequence: int
    """End of the sequence numbers of the autograd nodes that the call created; `start_sequence` is the first."""


@dataclass(frozen=True, eq=False)
class StepLog:
    """Storages and operations of one forward and backward pass.

    *Events* are numbered from 0. Each is one operation, except for one at the end of each pass, which only marks the
    end and costs nothing. Storage `s` is alive at event `e` if `births[s] <= e < deaths[s]`: from the event of the
    operation that creates it up to the last event before it is freed. Parameters, buffers and inputs are left out,
    since they are alive during the whole step.

    *Sequence numbers* come from autograd, which numbers the nodes of the graph in the order in which the forward pass
    creates them. An event of the forward pass has the number that the next node will get. An event of the backward
    pass has the number of the node that is running, even if the node is recomputing its saved tensors. A range of
    sequence numbers, such as the range of a `Call`, therefore identifies the same part of the network in both passes.
    """

    births: Integers
    """(storages,) Event that creates the storage."""
    deaths: Integers
    """(storages,) Event at which the storage is freed; the number of events if it never is."""
    sizes: Integers
    """(storages,) Size in bytes."""
    gradient_since: Integers
    """(storages,) First event at which it is the `grad` of a parameter; the number of events if it never is."""
    creators: Integers
    """(storages,) Index in `modules` of the innermost module that created it in the forward pass; else `NO_MODULE`."""
    sequence: Integers
    """(events,) Sequence numbers."""
    owners: Integers
    """(events,) Index in `modules` of the innermost module that ran, forward or backward."""
    flops: Integers
    """(events,) Floating-point operations, two for each multiply-add, as `count_flops` counts them."""
    moved_bytes: Integers
    """(events,) Bytes of all tensors that the operation read or wrote; 0 for views."""
    keep_kinds: Integers
    """(events,) 1 plus the index in `KEEP_NAMES` for an operator that `Reverse(keep=...)` can keep; negative for one
    that counts as a call of this name but cannot be kept; 0 for all others."""
    calls: Sequence[Call]
    """Calls of modules in the forward pass, in the order in which they began; the first is the model itself.

    Reversible blocks are missing, since a hook on a block changes the way in which it runs. Their residual functions
    are included.
    """
    modules: Sequence[str]
    """Names of the model's modules, in the order of `named_modules`."""
    forward_end: int
    """Event that marks the end of the forward pass, after the loss; storages alive at this event are held."""

    @property
    def num_events(self) -> int:
        """Number of operations, plus two for the marks."""
        return len(self.sequence)

    @cached_property
    def gradient_bytes(self) -> Integers:
        """(events,) Bytes alive in gradients of parameters."""
        return live_bytes(np.maximum(self.births, self.gradient_since), self.deaths, self.sizes, self.num_events)

    @cached_property
    def activation_bytes(self) -> Integers:
        """(events,) Bytes alive in everything else: activations, and gradients not yet in `grad`."""
        return live_bytes(self.births, np.minimum(self.deaths, self.gradient_since), self.sizes, self.num_events)

    @cached_property
    def live_bytes(self) -> Integers:
        """(events,) Bytes alive, activations and gradients together."""
        return self.activation_bytes + self.gradient_bytes

    @cached_property
    def is_held(self) -> NDArray[np.bool_]:
        """(storages,) Whether the storage is alive between the forward and the backward pass."""
        return (self.births < self.forward_end) & (self.deaths > self.forward_end)

    @property
    def held_bytes(self) -> int:
        """Bytes alive between the forward and the backward pass."""
        return int(self.activation_bytes[self.forward_end])

    def live(self, event: int) -> Integers:
        """Return the indices of the storages that are alive at an event."""
        return np.flatnonzero((self.births <= event) & (event < self.deaths))


def live_bytes(since: Integers, until: Integers, sizes: Integers, num_events: int) -> Integers:
    """Return the bytes alive at each event, if each storage lives from event `since` to just before `until`."""
    changes = np.zeros(num_events + 1, np.int64)
    counts = since < until
    np.add.at(changes, since[counts], sizes[counts])
    np.subtract.at(changes, until[counts], sizes[counts])
    return np.cumsum(changes[:-1])
