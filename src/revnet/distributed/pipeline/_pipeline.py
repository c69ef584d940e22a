"""A reversible model that is trained in stages on several processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revnet._checks import describe, is_integer, is_number
from revnet.distributed.pipeline._cut import cut_into_stages
from revnet.distributed.pipeline._link import Link, Traffic
from revnet.distributed.pipeline._microbatches import split, split_arguments
from revnet.distributed.pipeline._one_forward_one_backward import one_forward_one_backward, only_forward
from revnet.distributed.pipeline._stage_runner import StageRunner
from revnet.nn import ReversibleSequential

Loss = Callable[[Any, Any], Tensor]
"""Function that takes the output of the model and the target, and returns the mean loss of the microbatch."""


class Pipeline(nn.Module):
    """Train a reversible model in stages, one on each process, without keeping activations of microbatches.

    Each process runs some of the blocks. The batch is divided into microbatches, which follow each other through the
    stages in the 1F1B schedule. An ordinary pipeline keeps the activations of each microbatch until its gradient comes
    back. Here, a stage forgets its output as soon as the next stage has received it: for the backward pass, the next
    stage sends the output back, rebuilt, together with its gradient.

    All processes create the same model and call `step` with the same arguments. Each keeps only the parameters of its
    own stage, in `stage`. Without a process group there is one stage, and `step` accumulates gradients.

    Experimental on GPUs: the tests run on CPUs with gloo, and NCCL was not tried.

    Args:
        blocks: The blocks.
        num_microbatches: The number of microbatches, at least the number of processes. A process is idle for
            `num_stages - 1` of `num_microbatches + num_stages - 1` passes, so four times the number of stages is usual.
        stem: The module before the blocks, in the first process. It receives a microbatch, and returns a tensor or a pair
            of streams. It is computed again in the backward pass, unless it has a policy of its own.
        head: The module after the blocks, in the last process.
        num_blocks: The number of blocks in each stage. The default divides them evenly.
        group: The processes, in the order of the stages. The default is all processes. Its `timeout` is the longest time
            that a stage waits for another.

    Memory: between the passes, a stage holds the streams that it has just received, whatever the number of
        microbatches: an output and its gradients. With a `tolerance`, it holds its own input and output of each
        microbatch that is under way, at most `num_stages`. Blocks with other policies hold what their policies say.
    Time: as for `Reverse`. Stages send 1.5 times the bytes of an ordinary pipeline.
    Accuracy: gradients are as in one process with the same microbatches, up to the rounding of rebuilt streams, and bit
        for bit with `FixedPoint()`. Batch norm sees one microbatch at a time, as in one process. Random functions such as
        dropout draw from the state of their process, so give each process a seed of its own once the model exists, as
        in the example; with the same seed, all stages would draw the same numbers.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are fewer blocks or microbatches than processes, or stages share a parameter.

    References:
        Rivaud et al. (2025), PETRA: Parallel End-to-end Training with Reversible Architectures. Their method updates
        parameters with delay; this one does not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> from revnet.distributed import Pipeline
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(8)]
        >>> model = Pipeline(
        ...     ReversibleSequential(*blocks), num_microbatches=4, head=nn.Linear(4, 1)
        ... )
        >>> _ = torch.manual_seed(model.stage.index)  # dropout: other numbers in each stage
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
        if not is_integer(num_microbatches) or num_microbatches < 1:
            raise ValueError(f"`num_microbatches` (={describe(num_microbatches)}) must be a positive integer.")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"`group` (={describe(group)}) must be a process group that this process is part of, or None."
            )
        is_alone = group is None and not (dist.is_available() and dist.is_initialized())
        index, num_stages = (0, 1) if is_alone else (dist.get_rank(group), dist.get_world_size(group))
        if num_microbatches < num_stages:
            raise ValueError(
                f"`num_microbatches` (={num_microbatches}) must be at least the number of stages ({num_stages}), or some "
                f"processes would only wait; pass {4 * num_stages}, and a batch that can be divided by it."
            )
        stages = cut_into_stages(blocks, num_stages, num_blocks=num_blocks, stem=stem, head=head)
        self.num_microbatches = num_microbatches
        self.stage = stages[index]
        self._runner = StageRunner(self.stage)
        self._link = Link(group, index, num_stages, torch.device("cpu"))

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
            batch: A tensor, or a nested structure of tensors, which is divided along the first dimension. Only the
                first process reads it; others may pass None.
            target: The target, which is divided in the same way. Only the last process reads it.
            loss: Function that takes the output and the target of a microbatch, and returns their mean loss. The loss
                of the batch is the mean over microbatches.
            args: Additional positional arguments of every residual function. Tensors are divided like the batch.
            kwargs: Additional keyword arguments, which are divided in the same way. `f_kwargs` and `g_kwargs` are dicts
                for only one of the functions.
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
                "`step` needs gradients, which `torch.no_grad()` has disabled; call the pipeline instead."
            )
        if not callable(loss):
            raise TypeError(f"`loss` (={describe(loss)}) must be a function of the output and the target.")
        inputs = self._inputs(batch, args, kwargs, shared)
        targets = split("target", target, self.num_microbatches) if self.stage.is_last else []
        losses: dict[int, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64, device=self._link.device)

        def forward(number: int, received: list[Tensor]) -> list[Tensor]:
            output = self._forward(number, received, inputs)
            if self.stage.is_last:
                value = loss(self._runner.output(number), targets[number])
                if not isinstance(value, Tensor) or value.numel() != 1:
                    raise TypeError(
                        f"`loss` returned {describe(value)}, but must return a tensor with one element, the mean loss of "
                        "the microbatch; average it over the samples."
                    )
                losses[number] = value / self.num_microbatches
                total.add_(value.detach().reshape(()), alpha=1 / self.num_microbatches)
            return output

        def backward(number: int, received: list[Tensor]) -> list[Tensor]:
            if self.stage.is_last:
                return self._runner.backward_from_loss(number, losses.pop(number))
            return self._runner.backward(number, received)

        try:
            one_forward_one_backward(self._link, self.num_microbatches, forward, backward)
        finally:
            self._runner.forget()
        if self.stage.num_stages > 1:
            self._link.broadcast_from_last(total)
        return total

    @torch.no_grad()
    def forward(
        self,
        batch: Any,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> Any:
        """Compute the output without gradients, in the last process. Other processes get None.

        Args:
            batch: The batch, as in `step`.
            args: Additional positional arguments of every residual function, as in `step`.
            kwargs: Additional keyword arguments, as in `step`.
            shared: Additional keyword arguments that are not divided.

        Returns:
            The output of the head for the whole batch in the last process, and None in others. It must be a tensor.
        """
        inputs = self._inputs(batch, args, kwargs, shared)
        outputs: list[Tensor] = []

        def forward(number: int, received: list[Tensor]) -> list[Tensor]:
            streams = self._forward(number, received, inputs)
            if self.stage.is_last:
                outputs.append(self._runner.output(number))
            return streams

        try:
            only_forward(self._link, self.num_microbatches, forward)
        finally:
            self._runner.forget()
        return torch.cat(outputs) if self.stage.is_last else None

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of all stages so that their norm is at most `max_norm`, and return the norm before.

        `torch.nn.utils.clip_grad_norm_` would see only the gradients of one stage.
        """
        if not is_number(max_norm) or max_norm < 0:
            raise ValueError(f"`max_norm` (={describe(max_norm)}) must be a number from 0 up.")
        parameters: list[Tensor] = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        square = norm.to(self._device(), torch.float64).square()
        if self.stage.num_stages > 1:
            self._link.add_up(square)
        total = square.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def _inputs(
        self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, shared: dict[str, Any] | None
    ) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """Return the microbatches with the arguments of the residual functions, and begin a step."""
        if batch is None and self.stage.is_first:
            raise TypeError("`batch` is None, but the first stage needs it; pass it at least in the process of rank 0.")
        arguments = split_arguments(
            args, {} if kwargs is None else kwargs, {} if shared is None else shared, self.num_microbatches
        )
        batches = split("batch", batch, self.num_microbatches)
        self._link.device = self._device()
        self._link.begin_step()
        return [(x, *of_functions) for x, of_functions in zip(batches, arguments, strict=True)]

    def _forward(
        self, number: int, received: list[Tensor], inputs: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    ) -> list[Tensor]:
        x, args, kwargs = inputs[number]
        x = x if self.stage.is_first else received
        streams = self._runner.forward(number, x, args, kwargs, self._link.incoming)
        if streams and self._link.outgoing is None:
            self._link.send_header(self._runner.header(number, streams, self.num_microbatches))
        return streams

    def _device(self) -> torch.device:
        tensors: Iterable[Tensor] = (*self.stage.parameters(), *self.stage.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))
