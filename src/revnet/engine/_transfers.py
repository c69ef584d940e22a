"""Copies to host memory and back that run while the device computes.

Experimental: written, not run on a GPU.

This file decides the order of the copies, their number in flight, and the waits. `_copy_stream` makes the calls to the
device, and tests replace it by a simulation.

NOTE [ Order of copies ]

All copies of one compute stream go through one copy stream, in order. Memory belongs to the compute stream: the
allocator gives a tensor that was freed to the next kernel of that stream at once. Hence three rules.

 1. A copy waits for everything that the compute stream has queued before it. Its source has been written then, and
    nothing uses the memory of its target.
 2. The tensor on the device is held until the compute stream waits for the copy. `Tensor.record_stream` would also
    protect the memory, but then its reuse depends on when the host asks, so that the peak differs from step to step.
 3. A host buffer is only used by copies, which are in order, so that it can be reused at once.

Waiting is a command to the compute stream, and the host never waits. A tensor that is written to while it is held may
have been copied in part. Its version shows that, and unpacking it raises the error that autograd would raise.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from revnet._torch_internals import call_after_backward, current_backward
from revnet.engine._tensors import version_of

MOST_BYTES = 2**27
"""Bytes on the device that may wait for copies, in either direction. One tensor may be larger."""
MOST_COPIES = 32
"""Number of copies in flight. More small ones would only take time on the host."""


class CopyStream(Protocol):
    """Calls to a device."""

    @property
    def is_home(self) -> bool:
        """Whether the current stream of this thread is the compute stream."""

    def follow(self) -> None:
        """Let later copies wait for everything that the compute stream has queued."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between tensors of bytes, one of which is in pinned memory."""

    def mark(self) -> Any:
        """Return an event that stands for all copies so far."""

    def wait_for(self, event: Any) -> None:
        """Let later kernels of the compute stream wait for an event."""

    def new_buffer(self, num_bytes: int) -> Tensor:
        """Return pinned memory as a tensor of bytes."""


class _Copy:
    """A copy in flight, which holds the tensor on the device."""

    __slots__ = ("event", "num_bytes", "packed", "tensor", "version")

    def __init__(self, tensor: Tensor, packed: "PackedOnHost"):
        self.tensor, self.version = tensor, version_of(tensor)
        self.event: Any = None
        """Event after the copy; None if the copy has not begun."""
        self.num_bytes = packed.num_bytes
        # Weak: if the graph is dropped, the host buffer is free, and the copy stays in flight.
        self.packed = weakref.ref(packed)


class PackedOnHost:
    """A saved tensor in host memory."""

    __slots__ = (
        *("__weakref__", "_transfers", "buffer", "device", "dtype", "fetched", "is_torn", "num_bytes", "previous"),
        *("shape", "storing", "strides"),
    )

    def __init__(
        self, tensor: Tensor, buffer: Tensor, transfers: "Transfers", previous: "Callable[[], PackedOnHost | None]"
    ):
        self.buffer, self._transfers, self.previous = buffer, transfers, previous
        self.shape, self.strides = tensor.shape, tensor.stride()
        self.dtype, self.device, self.num_bytes = tensor.dtype, tensor.device, span_of(tensor)
        self.storing: _Copy | None = None
        """Copy to the host, while it is in flight."""
        self.fetched: _Copy | None = None
        """Copy to the device that was begun ahead of its use."""
        self.is_torn = False
        """Whether the tensor was written to before it was copied for certain."""

    def begin(self) -> None:
        """Begin the copy to the host, once the operation that saved the tensor has been queued."""
        self._transfers.begin(self)

    def unpack(self) -> Tensor:
        """Return the tensor on the device.

        Raises:
            RuntimeError: It was written to while it was copied.
        """
        return self._transfers.load(self)

    def __del__(self) -> None:
        self._transfers.give_buffer(self.buffer)


class Transfers:
    """The copies of one compute stream.

    Args:
        stream: Calls to the device.
        most_bytes: Bytes on the device that may wait for copies.
    """

    def __init__(self, stream: CopyStream, most_bytes: int = MOST_BYTES):
        self._stream, self._most_bytes = stream, most_bytes
        self._in_flight: deque[_Copy] = deque()
        self._buffers: dict[int, list[Tensor]] = {}
        self._newest: Callable[[], PackedOnHost | None] = type(None)
        self._backward = -1
        # Each device has its own backward thread.
        self._lock = threading.RLock()

    @property
    def bytes_in_flight(self) -> int:
        """Bytes on the device that wait for copies."""
        return sum([copy.num_bytes for copy in self._in_flight])

    def store(self, tensor: Tensor) -> PackedOnHost:
        """Pack a tensor, whose copy begins with `PackedOnHost.begin`."""
        with self._lock:
            packed = PackedOnHost(tensor, self._take_buffer(span_of(tensor)), self, self._newest)
            self._newest = weakref.ref(packed)
            # Detached: its node refers to the packed tensor, which would keep it alive.
            packed.storing = _Copy(tensor.detach(), packed)
            if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
                self.begin(packed)
                # FSDP frees the memory of a parameter, whoever holds it.
                self._settle(packed.storing)
            return packed

    def begin(self, packed: PackedOnHost) -> None:
        """Begin to copy a tensor to the host."""
        with self._lock:
            if packed.storing is None or packed.storing.event is not None:
                return
            self._stream.follow()
            self._stream.copy(packed.buffer[: packed.num_bytes], bytes_of(packed.storing.tensor))
            packed.storing.event = self._stream.mark()
            self._in_flight.append(packed.storing)
            while len(self._in_flight) > 1 and not self._has_room(0):
                self._settle(self._in_flight[0])

    def load(self, packed: PackedOnHost) -> Tensor:
        """Return a tensor on the device, and begin to fetch the tensors that were stored before it."""
        with self._lock:
            self.begin(packed)
            if packed.storing is not None and not self._stream.is_home:
                self._settle(packed.storing)
            packed.is_torn |= packed.storing is not None and _was_written(packed.storing)
            if packed.is_torn:
                raise overwritten_before_copy(packed.shape)
            if packed.storing is not None:
                # Still on the device.
                tensor = packed.storing.tensor
            else:
                fetched, packed.fetched = packed.fetched, None
                # Another stream could not reuse its memory in order.
                if fetched is None or not self._stream.is_home:
                    fetched = self._fetch(packed)
                self._settle(fetched)
                tensor = fetched.tensor
            if self._settles_after_backward() and self._stream.is_home:
                self._fetch_ahead(packed.previous())
            return tensor

    def _take_buffer(self, num_bytes: int) -> Tensor:
        # In powers of two, like PyTorch's allocator of pinned memory, so that changing shapes reuse buffers.
        size = 1 << max(9, (num_bytes - 1).bit_length())
        free = self._buffers.get(size)
        return free.pop() if free else self._stream.new_buffer(size)

    def give_buffer(self, buffer: Tensor) -> None:
        """Take back a host buffer. Copies that still use it come before the ones of its next owner (rule 3)."""
        self._buffers.setdefault(buffer.numel(), []).append(buffer)

    def settle(self) -> None:
        """Let the compute stream wait for all copies, and drop the tensors that were fetched and not used."""
        with self._lock:
            if self._in_flight:
                last = self._in_flight[-1]
                self._settle(last)
                if (packed := last.packed()) is not None and packed.fetched is last:
                    packed.fetched = None

    def _has_room(self, num_bytes: int) -> bool:
        """Return whether one more copy may be in flight."""
        return self.bytes_in_flight + num_bytes <= self._most_bytes and len(self._in_flight) < MOST_COPIES

    def _fetch(self, packed: PackedOnHost) -> _Copy:
        target = torch.empty_strided(packed.shape, packed.strides, dtype=packed.dtype, device=packed.device)
        self._stream.follow()
        self._stream.copy(bytes_of(target), packed.buffer[: packed.num_bytes])
        copy = _Copy(target, packed)
        copy.event = self._stream.mark()
        self._in_flight.append(copy)
        return copy

    def _fetch_ahead(self, packed: PackedOnHost | None) -> None:
        # The backward pass asks in reverse order.
        while packed is not None and self._has_room(packed.num_bytes):
            if packed.storing is None and packed.fetched is None and not packed.is_torn:
                packed.fetched = self._fetch(packed)
            packed = packed.previous()

    def _settles_after_backward(self) -> bool:
        """Have `settle` called when the current backward pass ends; return whether there is one."""
        backward = current_backward()
        if backward != self._backward:
            if not call_after_backward(self.settle):
                return False
            self._backward = backward
        return backward != -1

    def _settle(self, copy: _Copy) -> None:
        """Let the compute stream wait for a copy, and release the tensors of this copy and of all before it."""
        if copy not in self._in_flight:
            return
        self._stream.wait_for(copy.event)
        while self._in_flight:
            first = self._in_flight.popleft()
            packed = first.packed()
            if packed is not None and packed.storing is first:
                packed.storing = None
                packed.is_torn = _was_written(first)
            elif packed is not None and packed.fetched is first and first is not copy:
                # Passed over; held any longer, such tensors would add up.
                packed.fetched = None
            if first is copy:
                return


def span_of(tensor: Tensor) -> int:
    """Return the number of bytes from the first to the last element of a tensor."""
    if tensor.numel() == 0:
        return 0
    steps = [(count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return (sum(steps) + 1) * tensor.element_size()


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as a tensor of bytes."""
    # Bytes are copied without a temporary tensor, whatever the strides are.
    start = tensor.storage_offset() * tensor.element_size()
    alias = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), start, (span_of(tensor),), (1,))


def _was_written(copy: _Copy) -> bool:
    is_freed = copy.tensor.untyped_storage().nbytes() < copy.num_bytes
    return is_freed or version_of(copy.tensor) != copy.version


def overwritten_before_copy(shape: torch.Size) -> RuntimeError:
    """Return the error for a saved tensor that was written to before it was copied."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
        f"shape {tuple(shape)} was written to before it was copied to the host; use the operation's out-of-place form."
    )
