"""The state of a pass between two converted blocks, which rides on the tensor that the first one returned.

A converted block updates two streams and returns one of them, so that its host sees what an ordinary block returns. The
other stream and the run are attributes of the returned tensor. They are freed with it, and reach the next block through
whatever the host does in between. If the host hands the next block another tensor, it has no state, and the block
raises.
"""

from collections import OrderedDict
from dataclasses import dataclass
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from revnet.conversion._scheme import Scheme
from revnet.engine._digest import checksum
from revnet.engine._open_run import OpenRun
from revnet.engine._tensors import storage_key, version_of

_ATTRIBUTE = "_revnet_stream_state"
_NUM_OWN_REFERENCES = 3


@dataclass(slots=True, eq=False)
class StreamState:
    """What the next block needs, in addition to the tensor that the last one returned."""

    row: object
    """The row of blocks."""
    position: int
    """Index of the next block in its row."""
    scheme: Scheme
    """Scheme of this pass, which does not change before its end."""
    other: Tensor
    """The stream that is not returned."""
    primary: Tensor | None
    """The returned stream, if the returned tensor is a copy of it in another dtype; otherwise None."""
    input_dtype: torch.dtype | None
    """Dtype in which blocks read the streams, if it differs from the dtype of the streams."""
    run: OpenRun | None
    """The run, if gradients are enabled."""
    version: int = 0
    """Version of the returned tensor, which in-place operations raise."""
    other_version: int = 0
    """Version of the other stream, which an earlier block returned."""
    checksum: int | None = None
    """Checksum of the returned tensor, if it will be rebuilt; a write through `.data` raises no version."""

    def __reduce__(self) -> Any:
        """Return how to copy or pickle it: as an empty dictionary, so that features can be saved and loaded."""
        return OrderedDict, ()


def state_of(x: Tensor) -> StreamState | None:
    """Return the state that a tensor carries, or None."""
    state = getattr(x, _ATTRIBUTE, None)
    return state if isinstance(state, StreamState) else None


def attach(y: Tensor, state: StreamState) -> None:
    """Let a tensor carry a state."""
    state.version, state.other_version = version_of(y), version_of(state.other)
    # Reading a tensor on an accelerator would wait for it.
    state.checksum = checksum(y) if state.run is not None and y.device.type == "cpu" else None
    setattr(y, _ATTRIBUTE, state)


def was_overwritten(x: Tensor, state: StreamState) -> bool:
    """Return whether the tensor that carries a state was written to without raising its version."""
    return state.checksum is not None and checksum(x) != state.checksum


def take_other(state: StreamState) -> Tensor:
    """Return the stream that is not returned, without a state of its own if no one can hand it to a block anymore.

    It was returned by an earlier block. Its state refers to the stream before, and so on to the first one.
    """
    other = state.other
    # Referred to by the state, the local variable and the argument of the call.
    if getrefcount(other) <= _NUM_OWN_REFERENCES:
        vars(other).pop(_ATTRIBUTE, None)
    return other


def is_alias(x: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same values in the same memory, as before and after a backward hook."""
    if x.shape != other.shape or x.dtype != other.dtype or x.stride() != other.stride():
        return False
    key = storage_key(x)
    is_same = key is not None and key == storage_key(other) and x.storage_offset() == other.storage_offset()
    return is_same and version_of(x) == version_of(other)
