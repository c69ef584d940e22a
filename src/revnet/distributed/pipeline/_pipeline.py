"""A reversible model that is trained in stages on several processes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revnet._checks import check_count, describe, is_number
from revnet.distributed.pipeline._cut import cut_into_stages
from revnet.distributed.pipeline._link import Link, Traffic, place_in
from revnet.distributed.pipeline._microbatches import Input, Losses, checksum_of, divide, joined, split
from revnet.distributed.pipeline._one_forward_one_backward import one_forward_one_backward, only_forward
from revnet.distributed.pipeline._stage_runner import StageRunner
from revnet.nn import ReversibleSequential

Loss = Callable[[Any, Any], Tensor]
"""Function that takes the output of the model and the target, and returns the mean loss of the microbatch."""


class Pipeline(nn.Module):
    """Train a reversible model in stages, one on each process, without keeping activations of microbatches.

    The batch is divided into microbatches, which follow each other through the stages in the 1F1B schedule. An ordinary
    pipeline keeps the activations of each microbatch until its gradient comes back. Here, a stage forgets its output as
    soon as the next stage has received it: for the backward pass, the next stage sends the output back, rebuilt,
    together with its gradient.

    All processes create the same model and call `step` with the same arguments. Each of them trains the parameters of
    its own stage, `stage`. Without a process group there is one stage, and `step` accumulates gradients.

    Experimental on GPUs: it was tested on CPUs with gloo, and not with NCCL.

    Args:
        blocks: The blocks.
        num_microbatches: The number of microbatches, at least the number of stages. A stage is idle for a share of
            `(num_stages - 1) / (num_microbatches + num_stages - 1)` of a step.
        stem: The module before the blocks, in the first stage. It takes a microbatch, and returns a tensor or a pair of
            streams. It is computed again in the backward pass, unless it has a policy of its own.
        head: The module after the blocks, in the last stage.
        num_blocks: The number of blocks in each stage. The default divides them evenly.
        group: The processes, in the order of the stages; the default is all. Its `timeout` is the longest time that a
            stage waits for another.

    Memory: a stage holds the streams that it has just received, whatever the number of microbatches: an output and its
    gradients. With a `tolerance`, it holds its own input and output of each microbatch that is under way, at most
    `num_stages`. Blocks with other policies hold what their policies say.
    Time: as for `Reverse`. Stages send 1.5 times the bytes of an ordinary pipeline.
    Accuracy: gradients are as in one process with the same microbatches, up to the rounding of rebuilt streams, and bit
    for bit with `FixedPoint()`. Batch norm sees one microbatch at a time. Dropout draws from the random state of the
    process; seed each process differently once the model exists, or all stages draw the same numbers.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are fewer blocks or microbatches than processes, stages share a parameter, or `blocks` does
            more than run its blocks: it has hooks, or a `forward` or parameters of its own.

    References:
        Rivaud et al. (2025), PETRA: Parallel End-to-end Training with Reversible Architectures, without its delay.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> from revnet.distributed import Pipeline
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(8)]
        >>> model = Pipeline(
        ...     ReversibleSequential(*blocks), num_microbatches=4, head=nn.Linear(4, 1)
        ... )
        >>> _ = torch.manual_seed(model.stage.index)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = model.step(torch.rand(8, 4), torch.rand(8, 1), nn.functional.mse_loss)
        >>> optimizer.step()
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        blocks: ReversibleSequential,
        *,
        num_microbatches: int,
        stem: nn.Module | None = None,
        head: nn.Module | None = None,
        num_blocks: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        check_count("num_microbatches", num_microbatches)
        index, num_stages = place_in(group)
        if num_microbatches < num_stages:
            raise ValueError(
                f"`num_microbatches` (={num_microbatches}) must be at least the number of stages ({num_stages}), or "
                f"some would only wait; pass {4 * num_stages}, and a batch that can be divided by it."
            )
        stages = cut_into_stages(blocks, num_stages, num_blocks=num_blocks, stem=stem, head=head)
        self.num_microbatches = num_microbatches
        self.stage = stages[index]
        self._runner = StageRunner(self.stage)
        self._link = Link(group, index, num_stages)

    @property
    def traffic(self) -> Traffic:
        """The bytes that this process has sent to other stages in the last step."""
        return self._link.traffic

    def step(
        self,
        batch: Any,
        target: Any,
        loss: Loss,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> Tensor:
        """Run the forward and backward passes of a batch, and return the loss. Gradients accumulate.

        Args:
            batch: A tensor, or a nested structure of tensors, which is divided along the first dimension. Stages other
                than the first do not read it, and may get None.
            target: The target, divided in the same way. Only the last stage reads it.
            loss: Function that takes the output and the target of a microbatch, and returns their mean loss. The loss
                of the batch is the mean over microbatches.
            args: Additional positional arguments of every residual function. Tensors are divided like the batch.
            kwargs: Additional keyword arguments, divided in the same way. `f_kwargs` and `g_kwargs` are dicts for only
                one of the functions.
            shared: Additional keyword arguments that are not divided, such as a table of positions.

        Returns:
            The loss in float64, the same in all processes.

        Raises:
            NotImplementedError: An argument of the residual functions requires a gradient.
            RuntimeError: Another process has ended, or does not answer within the timeout of the group.
            TypeError: An argument has the wrong type, or is missing.
            ValueError: The batch cannot be divided into microbatches.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "`step` needs gradients, which `torch.no_grad()` has disabled; call the pipeline itself to evaluate."
            )
        if not callable(loss):
            raise TypeError(f"`loss` (={describe(loss)}) must be a function of the output and the target.")
        inputs = divide(batch, args, kwargs, shared, self.num_microbatches, self.stage)
        targets = split("target", target, self.num_microbatches) if self.stage.is_last else []
        losses = Losses(loss, targets, self.stage.device)
        self._link.begin_step(self.stage.device, checksum_of(batch))

        def forward(number: int, received: list[Tensor]) -> list[Tensor]:
            output = self._forward(number, received, inputs[number])
            if self.stage.is_last:
                losses.compute(number, self._runner.output(number))
            return output

        def backward(number: int, received: list[Tensor]) -> list[Tensor]:
            if self.stage.is_last:
                return self._runner.backward_from_loss(number, losses.take(number))
            return self._runner.backward(number, received)

        try:
            one_forward_one_backward(self._link, self.num_microbatches, forward, backward)
        finally:
            self._runner.forget()
        self._link.broadcast_from_last(losses.mean)
        return losses.mean

    @torch.no_grad()
    def forward(
        self,
        batch: Any,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> Any:
        """Compute the output without gradients. The arguments are as in `step`.

        Returns:
            The output for the whole batch in the last stage, and None in others.
        """
        inputs = divide(batch, args, kwargs, shared, self.num_microbatches, self.stage)
        outputs: list[Tensor] = []
        self._link.begin_step(self.stage.device, checksum_of(batch))

        def forward(number: int, received: list[Tensor]) -> list[Tensor]:
            streams = self._forward(number, received, inputs[number])
            if self.stage.is_last:
                outputs.append(self._runner.output(number))
            return streams

        try:
            only_forward(self._link, self.num_microbatches, forward)
        finally:
            self._runner.forget()
        return joined(outputs) if self.stage.is_last else None

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of all stages so that their norm is at most `max_norm`, and return the norm before.

        `torch.nn.utils.clip_grad_norm_` would see only the gradients of one stage.
        """
        if not (isinstance(max_norm, float) and max_norm == math.inf) and (not is_number(max_norm) or max_norm < 0):
            raise ValueError(f"`max_norm` (={describe(max_norm)}) must be 0 or more; infinity only returns the norm.")
        grads = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        square = nn.utils.get_total_norm(grads).to(self.stage.device, torch.float64).square()
        self._link.add_up(square)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm

    def _forward(self, number: int, received: list[Tensor], given: Input) -> list[Tensor]:
        x, args, kwargs = given
        x = x if self.stage.is_first else received
        streams = self._runner.forward(number, x, args, kwargs, self._link.incoming)
        if streams and self._link.outgoing is None:
            header = self._runner.header(number, streams, self.num_microbatches, self._link.checksum)
            self._link.send_header(header)
        return streams
