"""The passes of one stage of a reversible pipeline: the pipeline's own code, with messages that are not sent."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from revnet._model_output import explain_no_gradient
from revnet.distributed.pipeline._link import Header, Link
from revnet.distributed.pipeline._microbatches import Losses
from revnet.distributed.pipeline._one_forward_one_backward import one_forward_one_backward
from revnet.distributed.pipeline._stage_module import StageModule
from revnet.distributed.pipeline._stage_runner import StageRunner
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.step._run_step import Loss, check_losses, losses_of


@dataclass(frozen=True, eq=False)
class StageStep:
    """The step of one stage: its passes of all microbatches, in the order of the 1F1B schedule."""

    log: ProcessLog
    stage: StageModule
    microbatches: Sequence[Tensor]
    """Inputs of the model, which only the first stage uses."""
    incoming: Header | None
    """Description of the streams that come from the stage before; None in the first stage."""
    outgoing: Header | None
    """Description of the streams that go to the next stage; None in the last stage."""
    num_ahead: int
    """Number of microbatches that run forward before the first backward pass."""
    loss: Loss | None
    autocast: torch.dtype | None

    def run(self, between: Callable[[], None]) -> None:
        """Run the step as `Pipeline.step` does. Call `between` before each pass, once the pipeline has filled."""
        stage, runner, count = self.stage, StageRunner(self.stage), len(self.microbatches)
        link = _UnsentMessages(self)
        losses = Losses(self._loss, [None] * count, torch.device("cpu"))

        def forward(number: int, received: list[Tensor]) -> list[Tensor]:
            if number >= self.num_ahead:
                between()
            x = self.microbatches[number] if stage.is_first else received
            streams = runner.forward(number, x, (), {}, link.incoming)
            if stage.is_last:
                losses.compute(number, runner.output(number))
            return streams

        def backward(number: int, received: list[Tensor]) -> list[Tensor]:
            between()
            if stage.is_last:
                return runner.backward_from_loss(number, losses.take(number))
            return runner.backward(number, received)

        with nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast):
            one_forward_one_backward(link, count, forward, backward)
        link.broadcast_from_last(losses.mean)

    def _loss(self, output: Any, _: None) -> Tensor:
        losses = losses_of(output, self.loss)
        fault = None if losses else explain_no_gradient(self.stage, output)
        check_losses(self.stage, losses, is_given=self.loss is not None, fault=fault)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


class _UnsentMessages(Link):
    """Counts the messages of a stage. The messages that it receives are empty tensors."""

    def __init__(self, step: StageStep):
        index = 0 if step.stage.is_first else 1
        super().__init__(None, index, index + 1 + step.num_ahead)
        self._log = step.log
        self.incoming, self.outgoing = step.incoming, step.outgoing

    def wait(self, ops: Sequence[dist.P2POp]) -> None:
        """Do not wait, since there are no messages."""

    def broadcast_from_last(self, value: Tensor) -> None:
        """Count the value as sent."""
        if self.num_stages > 1:
            self._log.note_message(value)

    def _ops(self, kind: object, tensors: Sequence[Tensor], index: int) -> list[dist.P2POp]:
        for tensor in tensors:
            self._log.note_message(tensor)
        return []
