"""State that the functions of one forward pass share: arguments, devices, random states and autocast."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from revnet._torch_internals import HAS_ACCELERATOR, forward_mode_level
from revnet._torch_release import has_autocast
from revnet.engine._arguments import Arguments
from revnet.engine._capture import begins_in_capture, check_same_mode
from revnet.engine._random import (
    ONLY_CPU,
    RandomStates,
    cpu_random_state,
    get_random_state,
    memory_of,
    same_random_state,
)
from revnet.engine._restore import AutocastState, autocast_states
from revnet.engine._tensors import versions_of

_has_autocast = lru_cache(maxsize=16)(has_autocast)


@dataclass(slots=True, eq=False)
class Surroundings:
    """State that the functions of one forward pass share. The defaults are for a plain pass on the CPU."""

    arguments: list[Tensor] = field(default_factory=list)
    """Tensors in the additional arguments, without their nodes."""
    argument_versions: list[int] = field(default_factory=list)
    given: Arguments | None = None
    """The additional arguments of the function that runs next."""
    devices: frozenset[torch.device] = ONLY_CPU
    others: list[torch.device] = field(default_factory=list)
    """Devices other than the CPU."""
    autocast_types: tuple[str, ...] = ("cpu",)
    """Types of the devices that support autocast."""
    random: RandomStates | None = None
    """Random states after the last function, which are the ones before the next; None if unknown."""
    has_moved: bool = False
    """Whether the random state differs now from before the first function, so that replays put it back."""
    is_mixed: bool = False
    """Whether autocast is on for any of the devices."""
    autocast: tuple[AutocastState, ...] = ()
    """State of autocast; empty if it is off."""
    is_forward_mode: bool = False
    """Whether a level of forward-mode differentiation is active."""
    is_captured: bool = False
    """Whether the pass is captured in a CUDA graph, so that nothing may read the device."""

    @classmethod
    def of(cls, given: Arguments | None, streams: Sequence[Tensor]) -> "Surroundings":
        """Return the surroundings of a pass.

        Args:
            given: Additional arguments of the residual functions, if any.
            streams: The streams that the pass begins with.
        """
        arguments = [] if given is None else list(given.kept)
        surroundings = cls(arguments, versions_of(arguments), given)
        surroundings.add_devices({tensor.device for tensor in (*arguments, *streams)})
        return surroundings

    def add_devices(self, devices: Iterable[torch.device]) -> None:
        """Include additional devices."""
        types = {*self.autocast_types, *[device.type for device in devices]}
        # PyTorch raises when asked about autocast on a type of device without it.
        self.autocast_types = tuple(sorted(filter(_has_autocast, types)))
        # The meta device has no random state.
        self.devices |= {device for device in devices if device.type != "meta"}
        self.others = [device for device in self.devices if device.type != "cpu"]
        self.is_captured = HAS_ACCELERATOR and bool(self.others) and begins_in_capture()
        self.refresh()

    def refresh(self) -> None:
        """Update the state that code between two functions may have changed."""
        # That code may have drawn random numbers.
        self.random = None
        self.is_mixed = any(map(torch.is_autocast_enabled, self.autocast_types))
        self.autocast = autocast_states(self.autocast_types) if self.is_mixed else ()
        self.is_forward_mode = forward_mode_level() >= 0

    def look_at_random_states(self, begin: RandomStates) -> None:
        """Record whether the random states have changed since before the first function.

        A function may draw numbers and restore the state itself, so that the state does not show that it drew.

        Raises:
            ReconstructionError: Only one of the two passes is captured in a CUDA graph.
        """
        if HAS_ACCELERATOR and self.others:
            check_same_mode(self.is_captured)
        self.has_moved = not (
            same_random_state(begin[0], cpu_random_state())
            and all(map(same_random_state, begin[2], self.other_states()))
        )

    def random_states(self) -> RandomStates:
        """Return the random states of all devices."""
        state = cpu_random_state()
        return state, bytearray(memory_of(state.data_ptr())), self.other_states()

    def other_states(self) -> tuple[Tensor, ...]:
        """Return the random states of the devices other than the CPU."""
        return tuple(map(get_random_state, self.others))
