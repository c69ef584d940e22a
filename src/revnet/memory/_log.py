"""What happened to the memory of one training step, event by event."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

Integers = NDArray[np.int64]

NOBODY = -1
"""In place of a module's index, where none was at work: in the loss."""


class Call(NamedTuple):
    """One call of a module in the forward pass."""

    name: str
    """Of the module, as `named_modules` has it first."""
    module: nn.Module
    start_event: int
    stop_event: int
    """The first event after it."""
    start_sequence: int
    stop_sequence: int
    """The autograd nodes that the call made have the sequence numbers from `start_sequence` to before this one."""


@dataclass(frozen=True, eq=False)
class StepLog:
    """The storages and the operations of one forward and backward pass.

    *Events* are numbered from 0: each is one operation, but for the last two, which mark the ends of the two passes and
    cost nothing. Storage `s` is alive at event `e` if `births[s] <= e < deaths[s]`; a storage made by an operation is
    alive at its event, and one that is freed after an operation is not alive at the next. Parameters, buffers and
    inputs are no part of this: they are there all the time.

    *Sequence numbers* are autograd's, which count the nodes of the graph as the forward pass makes them. An event of
    the forward pass has the number that the next node would get; one of the backward pass has that of the node that
    runs, whose saved tensors it may be computing again. So a range of numbers names a stretch of the network in both
    passes: that of a `Call`, or that between two of them.
    """

    births: Integers
    """(storages,)"""
    deaths: Integers
    """(storages,) The number of events for what was never freed."""
    sizes: Integers
    """(storages,) In bytes."""
    gradient_since: Integers
    """(storages,) The event from which on it was the `grad` of a parameter; the number of events for all others."""
    creators: Integers
    """(storages,) The index in `modules` of the innermost module that made it, in the forward pass; else `NOBODY`."""
    sequence: Integers
    """(events,) Sequence numbers."""
    owners: Integers
    """(events,) The index in `modules` of the innermost module that was at work, or whose backward pass was."""
    flops: Integers
    """(events,) Floating-point operations, two for each multiply-add, as `count_flops` counts them."""
    moved_bytes: Integers
    """(events,) Bytes of all tensors that the operation read or wrote; 0 for views."""
    calls: Sequence[Call]
    """Calls of modules in the forward pass, in the order in which they began.

    The model's own is the first. Reversible blocks have none, only their residual functions: a hook on a block would
    have it run in another way.
    """
    modules: Sequence[str]
    """The names of the model's modules, in the order of `named_modules`."""
    forward_end: int
    """The event that marks the end of the forward pass, the loss included; what is alive then is held."""

    @property
    def num_events(self) -> int:
        """The number of operations, and two."""
        return len(self.sequence)

    @cached_property
    def gradient_bytes(self) -> Integers:
        """(events,) Bytes alive of gradients of parameters."""
        return self._alive(np.maximum(self.births, self.gradient_since), self.deaths)

    @cached_property
    def activation_bytes(self) -> Integers:
        """(events,) Bytes alive of everything else: activations, and gradients on their way."""
        return self._alive(self.births, np.minimum(self.deaths, self.gradient_since))

    @cached_property
    def live_bytes(self) -> Integers:
        """(events,) Bytes alive, of activations and gradients together."""
        return self.activation_bytes + self.gradient_bytes

    @cached_property
    def is_held(self) -> NDArray[np.bool_]:
        """(storages,) Whether it lives between the forward and the backward pass."""
        return (self.births < self.forward_end) & (self.deaths > self.forward_end)

    @property
    def held_bytes(self) -> int:
        """Bytes alive between the forward and the backward pass."""
        return int(self.activation_bytes[self.forward_end])

    def live(self, event: int) -> Integers:
        """The indices of the storages that are alive at an event."""
        return np.flatnonzero((self.births <= event) & (event < self.deaths))

    def _alive(self, since: Integers, until: Integers) -> Integers:
        """(events,) Bytes of the storages, each counted from event `since` to before `until`."""
        changes = np.zeros(self.num_events + 1, np.int64)
        counts = since < until
        np.add.at(changes, since[counts], self.sizes[counts])
        np.subtract.at(changes, until[counts], self.sizes[counts])
        return np.cumsum(changes[:-1])
