"""A CUDA stream for copies between a GPU and host memory; see `_transfers`.

Experimental: written, not run on a GPU.
"""

import threading

import torch
from torch import Tensor

from revnet.engine._transfers import Transfers


class CudaCopyStream:
    """Copies next to one compute stream, with the methods of `CopyStream`.

    Args:
        compute: The compute stream.
    """

    def __init__(self, compute: torch.cuda.Stream):
        self._compute = compute
        self._copies = torch.cuda.Stream(compute.device)

    @property
    def is_home(self) -> bool:
        """Whether the current stream of this thread is the compute stream."""
        return torch.cuda.current_stream(self._compute.device) == self._compute

    def follow(self) -> None:
        """Let later copies wait for everything that the compute stream and the current stream have queued."""
        self._copies.wait_stream(self._compute)
        if not self.is_home:
            self._copies.wait_stream(torch.cuda.current_stream(self._compute.device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between tensors of bytes, one of which is in pinned memory."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """Return an event that stands for all copies so far."""
        return self._copies.record_event()

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Let later kernels of the compute stream and of the current stream wait for an event."""
        self._compute.wait_event(event)
        if not self.is_home:
            torch.cuda.current_stream(self._compute.device).wait_event(event)

    def new_buffer(self, num_bytes: int) -> Tensor:
        """Return pinned memory as a tensor of bytes."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


_transfers: dict[tuple[int, int], Transfers] = {}
_lock = threading.Lock()


def transfers_for(device: torch.device) -> Transfers:
    """Return the transfers of the current compute stream of a GPU."""
    stream = torch.cuda.current_stream(device)
    with _lock:
        key = (stream.device_index, stream.cuda_stream)
        if key not in _transfers:
            _transfers[key] = Transfers(CudaCopyStream(stream))
        return _transfers[key]
