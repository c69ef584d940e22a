"""Forward and backward passes of one stage, microbatch by microbatch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revnet.distributed.pipeline._link import Header
from revnet.distributed.pipeline._stage_module import StageModule, check_only_blocks
from revnet.engine import Recording
from revnet.engine._backward_root import BackwardEntry
from revnet.engine._checkpoint import checkpointed_call
from revnet.nn import HasPolicies
from revnet.nn.blocks._run import leave


@dataclass(slots=True)
class _Pass:
    """What is kept of one microbatch between its passes."""

    recording: Recording
    incoming: Header | None
    """Description of the streams that were received; None in the first stage."""
    is_joined: bool
    """Whether the output is one tensor and not a tuple of streams."""
    output: list[Tensor]
    """Output of the blocks, in the last stage only."""
    entry: BackwardEntry = field(default_factory=BackwardEntry)
    """Beginning of the graph of the head, which does not keep the output after its backward pass."""


class StageRunner:
    """Runs one stage. Between its passes, a microbatch keeps no stream, except in the last stage.

    Args:
        stage: The stage.
    """

    def __init__(self, stage: StageModule):
        self.stage = stage
        self._passes: dict[int, _Pass] = {}

    def forget(self) -> None:
        """Forget the microbatches whose backward passes have not run, for instance after an error."""
        self._passes.clear()

    def forward(
        self,
        number: int,
        x: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        incoming: Header | None = None,
    ) -> list[Tensor]:
        """Run the stem, in the first stage, and the blocks. Return the streams for the next stage.

        Args:
            number: The number of the microbatch.
            x: The microbatch, in the first stage. In others the list of streams that were received; it is emptied.
            args: Additional positional arguments of the residual functions.
            kwargs: Additional keyword arguments.
            incoming: Description of the streams that were received; None in the first stage.

        Returns:
            The streams for the next stage; empty in the last stage.
        """
        stage = self.stage
        check_only_blocks(stage.blocks)  # Hooks may have been registered since the cut.
        if incoming is None:
            if stage.stem is not None:
                x = _run_stem(stage.stem, x)
            is_joined = isinstance(x, Tensor)
            streams, recording = stage.blocks.record(x, args, kwargs, needs_input=False)
        else:
            received, is_joined = tuple(x), incoming.is_joined
            x.clear()
            streams, recording = stage.blocks.record(
                received,
                args,
                kwargs,
                is_prepared=True,
                input_dtype=incoming.input_dtype,
                needs_input=incoming.needs_output,
            )
        self._passes[number] = _Pass(recording, incoming, is_joined, list(streams) if stage.is_last else [])
        return [] if stage.is_last else list(streams)

    def header(
        self, number: int, streams: Sequence[Tensor], num_microbatches: int, checksum: str | None = None
    ) -> Header:
        """Return the description of the streams that `forward` returned, with the checksum of the batch."""
        of_pass = self._passes[number]
        return Header.of(
            streams,
            of_pass.recording.input_dtype,
            is_joined=of_pass.is_joined,
            needs_output=of_pass.recording.needs_output,
            num_microbatches=num_microbatches,
            checksum=checksum,
        )

    def output(self, number: int) -> Any:
        """Return the output of the model, in the last stage. `backward_from_loss` continues from its loss."""
        of_pass = self._passes[number]
        streams: Sequence[Tensor] = of_pass.output
        if torch.is_grad_enabled():
            streams = of_pass.entry.enter(streams)
        y = leave(streams, of_pass.recording.input_dtype, self.stage.split_dim if of_pass.is_joined else None)
        return y if self.stage.head is None else self.stage.head(y)

    def backward_from_loss(self, number: int, loss: Tensor) -> list[Tensor]:
        """Run the backward passes of the head and of the blocks, in the last stage, and return what `backward` does."""
        with _without_autocast(loss.device):
            loss.backward()
        of_pass = self._passes[number]
        streams, of_pass.output = of_pass.output, []
        return self._backward(number, streams, of_pass.entry.take_grads(len(streams)), 0)

    def backward(self, number: int, received: list[Tensor]) -> list[Tensor]:
        """Run the backward pass of the blocks and of the stem.

        Args:
            number: The number of the microbatch.
            received: The output, if the stage needs it, and its gradients, as the next stage has sent them. The list is
                emptied.

        Returns:
            The input, if the stage before needs it, and its gradients; empty in the first stage.
        """
        count = len(received)
        if self._passes[number].recording.needs_output:
            count //= 2
        grads: list[Tensor | None] = [*received[-count:]]
        streams = received[:-count]
        received.clear()
        return self._backward(number, streams, grads, self.stage.num_above)

    def _backward(self, number: int, streams: list[Tensor], grads: list[Tensor | None], distance: int) -> list[Tensor]:
        of_pass = self._passes.pop(number)
        device = next((grad.device for grad in grads if grad is not None), self.stage.device)
        if not of_pass.recording.needs_output:
            streams.clear()
        with _without_autocast(device):
            inputs, input_grads = of_pass.recording.backward(streams, grads, distance=distance)
        if of_pass.incoming is None:
            return []
        filled = [
            of_pass.incoming.new_stream(index, device).zero_() if grad is None else grad
            for index, grad in enumerate(input_grads)
        ]
        return [*(inputs or ()), *filled]


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Run a backward pass without autocast, as a training loop does that calls `backward` outside of it."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def _run_stem(stem: torch.nn.Module, x: Any) -> Any:
    """Run the stem, and keep only its input, unless it has a policy of its own."""
    return stem(x) if isinstance(stem, HasPolicies) else checkpointed_call(stem, (x,), {})
