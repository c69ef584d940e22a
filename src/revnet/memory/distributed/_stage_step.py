"""The passes of one stage of a reversible pipeline, on fake tensors: the seam to the pipeline itself.

A stage keeps no activations of a microbatch between its passes. The next stage sends the output back, together with its
gradient, and the stage rebuilds the rest: Algorithm 1 of Gomez et al. (2017), one half-block at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from revnet.engine import HalfBlock
from revnet.engine._checkpoint import checkpointed_call
from revnet.memory.distributed._model_parts import ModelParts
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.step._run_step import Loss, check_losses, losses_of
from revnet.nn import AbstractReversibleBlock, ReversibleSequential


class Stage(nn.Module):
    """Consecutive blocks of a pipeline, with the stem in the first stage and the head in the last."""

    def __init__(self, stem: nn.Module | None, blocks: ReversibleSequential, head: nn.Module | None):
        super().__init__()
        self.stem, self.blocks, self.head = stem, blocks, head

    @property
    def half_blocks(self) -> list[HalfBlock]:
        """The half-blocks, in order."""
        blocks = [block for block in self.blocks if isinstance(block, AbstractReversibleBlock)]
        return [half_block for block in blocks for half_block in block.half_blocks()]


@dataclass(frozen=True, eq=False)
class StageStep:
    """The step of one stage: its passes of all microbatches, in the order of the 1F1B schedule."""

    log: ProcessLog
    stage: Stage
    microbatches: Sequence[Tensor]
    """Inputs of the model, which only the first stage uses."""
    parts: ModelParts
    """Parts of the whole model."""
    num_ahead: int
    """Number of microbatches that run forward before the first backward pass."""
    rank: int
    num_stages: int
    loss: Loss | None
    autocast: torch.dtype | None

    def run(self, between: Callable[[], None]) -> None:
        """Run the step. Call `between` before each pass, once the pipeline has filled."""
        runner, count, ahead = _Runner(self), len(self.microbatches), self.num_ahead
        is_first, is_last = self.rank == 0, self.rank == self.num_stages - 1
        for number in range(ahead):
            self._send(runner.forward(number, self._receive(not is_first, -1)), 1)
        received = self._receive(not is_first and ahead < count, -1)
        for number in range(ahead, count):
            between()
            output = runner.forward(number, received)
            received = self._receive(not is_last, 1)
            self._send([] if is_last else output, 1)
            if is_last:
                received = runner.backward_of_head(output)
            del output
            between()
            result = runner.backward(received)
            received = self._receive(not is_first and number + 1 < count, -1)
            self._send(result, -1)
            del result
        for _ in range(ahead):
            received = self._receive(not is_last, 1)
            between()
            self._send(runner.backward(received), -1)

    def _receive(self, is_sent: bool, direction: int) -> list[Tensor]:
        """Return the input, from the stage before, or the output and its gradient, from the next stage."""
        if not is_sent:
            return []
        count = 1 if direction < 0 else 2
        with self.log.pause():
            streams = self.parts.streams()
        received = [torch.empty_like(stream) for _ in range(count) for stream in streams]
        for tensor in received:
            self.log.note_message(tensor)
        return received

    def _send(self, tensors: Sequence[Tensor], direction: int) -> None:
        if 0 <= self.rank + direction < self.num_stages:
            for tensor in tensors:
                self.log.note_message(tensor)


class _Runner:
    """Runs the passes of single microbatches."""

    def __init__(self, step: StageStep):
        self._step, self._half_blocks = step, step.stage.half_blocks
        self._of_stem: list[list[GradientEdge]] = []
        """Ends of the graph of the stem, of each microbatch whose backward pass has not run."""

    def forward(self, number: int, received: list[Tensor]) -> list[Tensor]:
        """Run the stem, in the first stage, and the blocks. The list of received streams is emptied."""
        with self._autocast():
            streams = self._run_stem(self._step.microbatches[number]) if self._step.rank == 0 else list(received)
            received.clear()
            with torch.no_grad():
                for half_block in self._half_blocks:
                    residual = half_block.function(streams[half_block.source])
                    streams[half_block.target] = half_block.coupling.forward(streams[half_block.target], residual)
                    del residual
        return streams

    def backward_of_head(self, output: list[Tensor]) -> list[Tensor]:
        """Run the head and the loss, forward and backward; return the streams and their gradients."""
        leaves = [stream.requires_grad_() for stream in output]
        with self._autocast():
            activation, head = self._step.parts.joined(leaves), self._step.stage.head
            losses = losses_of(activation if head is None else head(activation), self._step.loss)
            check_losses(self._step.stage, losses, is_given=self._step.loss is not None)
            del activation
        torch.autograd.backward([loss / len(self._step.microbatches) for loss in losses])
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return [*(leaf.detach() for leaf in leaves), *gradients]

    def backward(self, received: list[Tensor]) -> list[Tensor]:
        """Run the backward pass of the blocks and of the stem; return the input and its gradients."""
        count = len(received) // 2
        streams, grads = received[:count], received[count:]
        received.clear()
        for half_block in reversed(self._half_blocks):
            self._undo(half_block, streams, grads)
        if self._step.rank > 0:
            return [*streams, *grads]
        del streams
        if edges := self._of_stem.pop(0):
            torch.autograd.backward(edges, grads)
        return []

    def _run_stem(self, x: Tensor) -> list[Tensor]:
        stem = self._step.stage.stem
        streams = self._step.parts.split(x if stem is None else checkpointed_call(stem, (x,), {}))
        # The edges keep the graph, and none of the streams.
        self._of_stem.append([get_gradient_edge(stream) for stream in streams if stream.requires_grad])
        return [stream.detach() for stream in streams]

    def _undo(self, half_block: HalfBlock, streams: list[Tensor], grads: list[Tensor]) -> None:
        """Rebuild the stream before a half-block, and run the backward pass of its function."""
        target, source = half_block.target, half_block.source
        x = streams[source].detach().requires_grad_()
        with self._autocast():
            residual = half_block.function(x)
        with torch.no_grad():
            streams[target] = half_block.coupling.inverse(streams[target], residual.detach())
        if half_block.coupling.is_additive:
            torch.autograd.backward(residual, grads[target].to(residual.dtype))
        else:
            before = streams[target].detach().requires_grad_()
            torch.autograd.backward(half_block.coupling.forward(before, residual), grads[target])
            assert before.grad is not None
            grads[target] = before.grad
        if x.grad is not None:
            grads[source] = grads[source] + x.grad

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self._step.autocast is None else torch.autocast("cpu", self._step.autocast)
