"""Messages between the stages of a pipeline."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from revnet._checks import describe
from revnet.engine._tensors import in_memory_order, is_dense


@dataclass
class Traffic:
    """Bytes that one process has sent to other stages in one step.

    Example:
        >>> from revnet.distributed import Traffic
        >>> print(Traffic(forward_bytes=1_048_576, backward_bytes=2_097_152, num_tensors=6))
        sent 1,048,576 bytes forward and 2,097,152 bytes backward in 6 tensors
    """

    forward_bytes: int = 0
    """Bytes of the outputs that were sent to the next stage."""
    backward_bytes: int = 0
    """Bytes that were sent to the stage before: rebuilt streams and their gradients."""
    num_tensors: int = 0
    """Number of tensors that were sent."""

    def __str__(self) -> str:
        return (
            f"sent {self.forward_bytes:,} bytes forward and {self.backward_bytes:,} bytes backward in "
            f"{self.num_tensors:,} tensors"
        )


@dataclass(frozen=True)
class Header:
    """Description of the streams that a stage sends to the next one in this step."""

    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    input_dtype: torch.dtype | None
    """Dtype in which residual functions read the streams, if it differs from the dtype of the streams."""
    is_joined: bool
    """Whether the output is one tensor and not a tuple of streams."""
    needs_output: bool
    """Whether the stage that sends them needs them back."""
    num_microbatches: int
    checksum: str | None
    """Checksum of the batch of the first stage."""

    @classmethod
    def of(
        cls,
        streams: Sequence[Tensor],
        input_dtype: torch.dtype | None,
        *,
        is_joined: bool,
        needs_output: bool,
        num_microbatches: int,
        checksum: str | None = None,
    ) -> "Header":
        """Return the header for streams in the layout of these."""
        return cls(
            tuple([tuple(stream.shape) for stream in streams]),
            tuple([stream.stride() if is_dense(stream) else stream.contiguous().stride() for stream in streams]),
            tuple([stream.dtype for stream in streams]),
            input_dtype,
            is_joined,
            needs_output,
            num_microbatches,
            checksum,
        )

    def new_streams(self, device: torch.device) -> list[Tensor]:
        """Return empty tensors that receive the streams, or their gradients."""
        return [self.new_stream(index, device) for index in range(len(self.shapes))]

    def new_stream(self, index: int, device: torch.device) -> Tensor:
        """Return an empty tensor in the layout of one stream."""
        return torch.empty_strided(self.shapes[index], self.strides[index], dtype=self.dtypes[index], device=device)

    def check(self, streams: Sequence[Tensor]) -> None:
        """Raise unless these streams of another microbatch fit the description, by which they are received.

        Raises:
            ValueError: They have other shapes or dtypes.
        """
        for index, (stream, shape, dtype) in enumerate(zip(streams, self.shapes, self.dtypes, strict=True)):
            if stream.shape != shape or stream.dtype != dtype:
                raise ValueError(
                    f"stream {index + 1} of a microbatch is {stream.dtype} of shape {tuple(stream.shape)}, but "
                    f"{dtype} of shape {shape} in the first microbatch of the step, as which the next stage receives "
                    "it; pad in the stem to one size for the whole batch, or pass `num_microbatches=1`."
                )

    def laid_out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors in the layout of the streams, in which they are sent."""
        count = len(self.strides)
        return [_with_strides(tensor, self.strides[index % count]) for index, tensor in enumerate(tensors)]


class Link:
    """Messages to the stages before and after, and the bytes sent.

    All processes of the group are stages, in the order of their ranks.

    Args:
        group: The process group, or None for the default one.
        index: The place of this stage.
        num_stages: The number of stages.
    """

    def __init__(self, group: dist.ProcessGroup | None, index: int, num_stages: int):
        self.group, self.index, self.num_stages = group, index, num_stages
        self.device = torch.device("cpu")
        """Device of the streams."""
        self.checksum: str | None = None
        """Checksum of the batch; in later stages, the checksum that the first stage has sent."""
        self.traffic = Traffic()
        self.incoming: Header | None = None
        """Description of the streams that the stage before sends; None until it is received."""
        self.outgoing: Header | None = None
        """Description of the streams that this stage sends."""

    @property
    def is_first(self) -> bool:
        """Whether there is no stage before."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether there is no stage after."""
        return self.index == self.num_stages - 1

    def begin_step(self, device: torch.device, checksum: str | None = None) -> None:
        """Forget the headers of the last step, whose batch may have had another size, and count bytes from 0.

        Args:
            device: The device of the streams.
            checksum: Checksum of this process's batch, to compare with the first stage; None if it has no batch.
        """
        self.device, self.checksum = device, checksum
        self.incoming = self.outgoing = None
        self.traffic = Traffic()

    def receive_header(self, num_microbatches: int) -> None:
        """Receive the header of the stage before, once in each step.

        Raises:
            ValueError: The two processes have different numbers of microbatches, or another batch.
        """
        if self.incoming is not None or self.is_first:
            return
        messages: list[Any] = [None]
        with self._explained("receiving from", self.index - 1):
            dist.recv_object_list(messages, self._rank(self.index - 1), self.group, self._object_device())
        header: Header = messages[0]
        if header.num_microbatches != num_microbatches:
            raise ValueError(
                f"`num_microbatches` is {num_microbatches} in stage {self.index}, but {header.num_microbatches} in "
                f"stage {self.index - 1}; pass the same number in all processes."
            )
        if None not in (self.checksum, header.checksum) and self.checksum != header.checksum:
            raise ValueError(
                f"`batch` in stage {self.index} differs from the batch in stage 0; pass the same batch in all "
                "processes (a sampler must not divide the data among the stages), or None in all stages but the first."
            )
        self.incoming, self.checksum = header, header.checksum

    def send_header(self, header: Header) -> None:
        """Send the header to the next stage, once in each step."""
        if self.outgoing is None and not self.is_last:
            self.outgoing = header
            with self._explained("sending to", self.index + 1):
                dist.send_object_list([header], self._rank(self.index + 1), self.group, self._object_device())

    def exchange(
        self,
        *,
        to_next: Sequence[Tensor] = (),
        to_previous: Sequence[Tensor] = (),
        from_next: bool = False,
        from_previous: bool = False,
    ) -> list[Tensor]:
        """Send to and receive from one neighbor at a time, or send to one and receive from the other.

        Args:
            to_next: The output, for the next stage.
            to_previous: What `backward` returned, for the stage before.
            from_next: Whether to receive the output, if this stage needs it, and its gradients.
            from_previous: Whether to receive the input.

        Returns:
            The received tensors.
        """
        sends = self.send_ops(to_next=to_next, to_previous=to_previous)
        receives, received = self.receive_ops(from_next=from_next, from_previous=from_previous)
        self.wait([*sends, *receives])
        return received

    def send_ops(self, *, to_next: Sequence[Tensor] = (), to_previous: Sequence[Tensor] = ()) -> list[dist.P2POp]:
        """Return the operations that send tensors, and count their bytes.

        Raises:
            ValueError: The output differs in shape or dtype from the output for the first microbatch of the step.
        """
        ops = []
        if to_next and not self.is_last:
            assert self.outgoing is not None
            self.outgoing.check(to_next)
            ops += self._ops(dist.isend, self.outgoing.laid_out(to_next), self.index + 1)
            self.traffic.forward_bytes += sum(tensor.nbytes for tensor in to_next)
            self.traffic.num_tensors += len(to_next)
        if to_previous and not self.is_first:
            assert self.incoming is not None
            ops += self._ops(dist.isend, self.incoming.laid_out(to_previous), self.index - 1)
            self.traffic.backward_bytes += sum(tensor.nbytes for tensor in to_previous)
            self.traffic.num_tensors += len(to_previous)
        return ops

    def receive_ops(
        self, *, from_next: bool = False, from_previous: bool = False
    ) -> tuple[list[dist.P2POp], list[Tensor]]:
        """Return the operations that receive tensors, and the tensors."""
        received: list[Tensor] = []
        peer = self.index
        if from_next and not self.is_last:
            assert self.outgoing is not None
            peer = self.index + 1
            received = self.outgoing.new_streams(self.device) if self.outgoing.needs_output else []
            received += self.outgoing.new_streams(self.device)
        elif from_previous and not self.is_first:
            assert self.incoming is not None
            peer = self.index - 1
            received = self.incoming.new_streams(self.device)
        return self._ops(dist.irecv, received, peer), received

    def wait(self, ops: Sequence[dist.P2POp]) -> None:
        """Start the operations together, and wait for them.

        Raises:
            RuntimeError: A process has ended, or does not answer within the timeout of the group.
        """
        if ops:
            peers = sorted({self._index(op.peer) for op in ops})
            with self._explained("exchanging streams with", *peers):
                for work in dist.batch_isend_irecv(list(ops)):
                    work.wait()

    def broadcast_from_last(self, value: Tensor) -> None:
        """Overwrite `value` with the value in the last stage."""
        if self.num_stages == 1:
            return
        last = self.num_stages - 1
        action, peers = ("sending to", range(last)) if self.is_last else ("receiving from", [last])
        with self._explained(action, *peers):
            dist.broadcast(value, self._rank(self.num_stages - 1), self.group)

    def add_up(self, value: Tensor) -> None:
        """Overwrite `value` with the sum over all stages."""
        if self.num_stages == 1:
            return
        with self._explained("summing with", *[index for index in range(self.num_stages) if index != self.index]):
            dist.all_reduce(value, group=self.group)

    def _ops(self, kind: Any, tensors: Sequence[Tensor], index: int) -> list[dist.P2POp]:
        return [
            dist.P2POp(kind, _wire(tensor), self._rank(index), self.group) for tensor in tensors if tensor.numel() > 0
        ]

    def _rank(self, index: int) -> int:
        return index if self.group is None else dist.get_global_rank(self.group, index)

    def _index(self, rank: int) -> int:
        return rank if self.group is None else dist.get_group_rank(self.group, rank)

    def _object_device(self) -> torch.device | None:
        return None if self.device.type == "cpu" else self.device

    @contextmanager
    def _explained(self, what: str, *indices: int) -> Iterator[None]:
        """Raise one clear error if a process does not answer."""
        try:
            yield
        except RuntimeError as error:
            # The first sentence, without the place in the source of the backend.
            reason = re.sub(r"^\[\S+\] *", "", str(error).strip()).split("\n")[0].split(". ")[0]
            peers = " and ".join(f"stage {index} (rank {self._rank(index)})" for index in indices)
            raise RuntimeError(
                f"stage {self.index} (rank {self._rank(self.index)}) failed while {what} {peers}: a process has ended, "
                "or does not answer within the `timeout` of the process group; look for the first error in its output, "
                f"and start all processes again ({reason})."
            ) from error


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the place of this process in a group, and the number of processes. Without a group it is alone.

    Raises:
        RuntimeError: There are several processes, and no group.
        TypeError: `group` is not a process group, or does not contain this process.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                "this is one of several processes, but there is no process group, so each of them would train the "
                "whole model; call `torch.distributed.init_process_group` first."
            )
        return 0, 1
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"`group` (={describe(group)}) must be a process group with this process, or None.")
    return dist.get_rank(group), dist.get_world_size(group)


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the tensor, or a copy of it with these strides."""
    if tensor.stride() == strides:
        return tensor
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _wire(tensor: Tensor) -> Tensor:
    """Return the memory of a dense tensor as bytes, which every backend can send."""
    flat = in_memory_order(tensor.detach()).reshape(-1)
    return (torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat).view(torch.uint8)
