"""The adapter for PyTorch's pipeline schedules."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from revnet._checks import describe
from revnet.distributed.pipeline._link import Link, Traffic
from revnet.distributed.pipeline._stage_module import StageModule
from revnet.distributed.pipeline._stage_runner import StageRunner


class ReversibleStage(PipelineStage):
    """A stage for PyTorch's `Schedule1F1B` that keeps no activations of a microbatch, because its output comes back.

    Prefer `Pipeline`, which holds less: PyTorch's schedule keeps a microbatch or two in its variables. Use this class
    if you depend on `torch.distributed.pipelining`. `ScheduleGPipe` works, too, but its memory grows with the number
    of microbatches: it waits for its messages only at the end, and each message holds what it sends. Schedules that
    divide the backward pass in two, such as `ScheduleInterleavedZeroBubble`, and several stages in one process are not
    supported.

    Keyword arguments of `schedule.step` reach the residual functions of all stages, like `kwargs` of `Pipeline.step`.

    Experimental: it overrides methods of `PipelineStage` that are not documented, and was tested with PyTorch 2.13 on
    CPUs with gloo.

    Args:
        stage: The stage, one of the results of `cut_into_stages`.
        device: The device of the streams.
        group: The processes, in the order of the stages. The default is all processes.

    Raises:
        TypeError: `stage` is not a stage.
        ValueError: The group has another number of processes than there are stages, or another order.
    """

    def __init__(
        self,
        stage: StageModule,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ):
        if not isinstance(stage, StageModule):
            raise TypeError(f"`stage` (={describe(stage)}) must be a result of `cut_into_stages`.")
        if (dist.get_rank(group), dist.get_world_size(group)) != (stage.index, stage.num_stages):
            raise ValueError(
                f"`stage` is stage {stage.index} of {stage.num_stages}, but this process has rank "
                f"{dist.get_rank(group)} of {dist.get_world_size(group)}; cut the model into one stage for each "
                "process, and take the stage of the rank."
            )
        device = torch.device(device)
        super().__init__(stage, stage.index, stage.num_stages, device, group=group)
        self._runner = StageRunner(stage)
        self._link = Link(group, stage.index, stage.num_stages)
        self._link.begin_step(device)
        self._received: dict[int, list[Tensor]] = {}
        self._results: dict[int, list[Tensor]] = {}

    @property
    def traffic(self) -> Traffic:
        """The bytes that this process has sent to other stages in the last step."""
        return self._link.traffic

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        # PyTorch would run the model once more to learn the shapes, and so move the statistics of batch norms.
        self.chunks = num_microbatches

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        self.chunks = num_microbatches

    def clear_runtime_states(self) -> None:
        """Forget the last step."""
        super().clear_runtime_states()
        self._runner.forget()
        self._received.clear()
        self._results.clear()
        self._link.begin_step(self.device)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the operations that receive the input of a microbatch."""
        if self.is_first:
            return []
        self._link.receive_header(self._num_chunks())
        ops, self._received[fwd_chunk_id] = self._link.receive_ops(from_previous=True)
        return ops

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the operations that send the output of a microbatch."""
        return [] if self.is_last else self._link.send_ops(to_next=self._results.pop(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the operations that receive the output of a microbatch, and its gradients."""
        if self.is_last or not self.has_backward:
            return []
        ops, self._received[bwd_chunk_id] = self._link.receive_ops(from_next=True)
        return ops

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the operations that send the input of a microbatch, and its gradients."""
        if self.is_first or not self.has_backward:
            return []
        return self._link.send_ops(to_previous=self._results.pop(bwd_chunk_id))

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Run the forward pass of a microbatch."""
        # Two arguments are a pair of streams.
        batch = args[0] if len(args) == 1 else args
        x = batch if self.is_first else self._received.pop(fwd_chunk_id)
        streams = self._runner.forward(fwd_chunk_id, x, (), kwargs or {}, self._link.incoming)
        if not self.is_last:
            if self._link.outgoing is None:
                self._link.send_header(self._runner.header(fwd_chunk_id, streams, self._num_chunks()))
            self._results[fwd_chunk_id] = streams
            return None
        output = self._runner.output(fwd_chunk_id)
        if save_forward_output:
            self.output_chunks.append(output.detach() if isinstance(output, Tensor) else output)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run the backward pass of a microbatch."""
        if not self.has_backward:
            return
        if not full_backward:
            raise NotImplementedError(
                "a reversible stage computes the gradients of inputs and parameters together, because both need the "
                "rebuilt activations; use `Schedule1F1B` instead of a zero-bubble schedule."
            )
        if self.is_last:
            self._results[bwd_chunk_id] = self._runner.backward_from_loss(bwd_chunk_id, loss)
        else:
            self._results[bwd_chunk_id] = self._runner.backward(bwd_chunk_id, self._received.pop(bwd_chunk_id))

    def _num_chunks(self) -> int:
        assert self.chunks is not None
        return self.chunks
