"""The inverse and the log-determinants of reversible blocks and sequences."""

import abc
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from revnet._checks import check_bool, describe
from revnet._types import Streams, TensorPair
from revnet.engine import Chain, Recording
from revnet.engine._split import prepare
from revnet.engine._streams import begin
from revnet.engine._tolerance import ToleranceKeeper
from revnet.nn.blocks._blocks_in_runs import RunsBlocks
from revnet.nn.blocks._run import check_names, run_inverse, run_recorded, sum_log_dets
from revnet.nn.blocks._schedule import Schedule
from revnet.nn.blocks._split_dim import unclear_split_dim


class AbstractReversible(nn.Module, RunsBlocks):
    """A reversible block, or a sequence of them: a module whose input can be computed from its output."""

    _keeper: ToleranceKeeper | None = None

    @abc.abstractmethod
    def _build_schedule(self) -> Schedule:
        """Build the schedule of the module."""

    @abc.abstractmethod
    def _schedule(self) -> Schedule:
        """Return the schedule of the module, the cached one if it is still valid."""

    @abc.abstractmethod
    def _run(
        self, x: Tensor | Streams, args: tuple[Any, ...], kwargs: dict[str, Any], log_dets: list[Tensor] | None
    ) -> Any:
        """Run forward on `x`, and append log-determinants to `log_dets` if it is a list."""

    @overload
    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    @overload
    def inverse(self, y: TensorPair, *args: Any, **kwargs: Any) -> TensorPair: ...
    @overload
    def inverse(self, y: Streams, *args: Any, **kwargs: Any) -> Streams: ...

    def inverse(self, y: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor | Streams:
        """Compute the input from the output `y`. Pass the additional arguments that the forward pass had.

        The inverse is differentiable by ordinary autograd. It does not change batch-norm statistics. Use evaluation
        mode for blocks with dropout, because in training mode dropout would draw a new mask.
        """
        schedule = self._schedule()
        half_blocks = [half_block for _, chain in schedule.segments for half_block in chain.half_blocks]
        if schedule.ambiguous is not None and isinstance(y, Tensor) and y.dim() == 3:
            raise unclear_split_dim(schedule.ambiguous, y)
        return run_inverse(Chain(half_blocks), y, schedule.split_dim, schedule.num_streams, args, kwargs)

    def forward_with_log_det(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> tuple[Tensor | Streams, Tensor]:
        """Compute the output, and for each sample the log-determinant of the map from input to output, (B,).

        Both are differentiable, and the policies apply as in `forward`. The log-determinant of additive blocks is zero.

        Raises:
            ValueError: The blocks split along the batch dimension, so that the samples depend on each other.
        """
        log_dets: list[Tensor] = []
        y = self._run(x, args, kwargs, log_dets)
        return y, sum_log_dets(log_dets, y)

    def log_det(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the log-determinant at `x` for each sample, (B,)."""
        return self.forward_with_log_det(x, *args, **kwargs)[1]

    def record(
        self,
        x: Tensor | Streams,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        is_prepared: bool = False,
        input_dtype: torch.dtype | None = None,
        needs_input: bool = True,
    ) -> tuple[Streams, Recording]:
        """Run forward without holding the output, and return the output as streams, with the recording of the pass.

        Use it if the output leaves this process, as in a pipeline, and comes back for the backward pass:
        `Recording.backward` takes the streams and their gradients, and returns the input and its gradients. In between,
        the recording holds no stream. If `x` requires a gradient, the backward pass continues into its graph. Hooks of
        this module do not run.

        Args:
            x: The activation, or the streams.
            args: Additional positional arguments of every residual function.
            kwargs: Additional keyword arguments, as for `forward`.
            is_prepared: Whether `x` are streams that `record` of another sequence returned, and are used as they are.
            input_dtype: The `Recording.input_dtype` of that other sequence.
            needs_input: Whether `Recording.backward` must return the input. The first stage of a pipeline needs none.

        Returns:
            The streams, which may be wider than `x` under `FixedPoint`, and the recording.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: There are no blocks, or `x` does not fit them.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from revnet import ReversibleBlock, ReversibleSequential
            >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(8)]
            >>> model = ReversibleSequential(*blocks)
            >>> y, recording = model.record(torch.rand(3, 4))
            >>> x, grads = recording.backward(y, [torch.ones_like(stream) for stream in y])
            >>> grads[0].shape
            torch.Size([3, 2])
        """
        schedule = self._schedule()
        if not schedule.segments:
            raise ValueError("`record` needs at least one block, but the sequence is empty; add a block.")
        if not isinstance(args, tuple):
            raise TypeError(f"`args` (={describe(args)}) must be a tuple of positional arguments, such as (context,).")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(f"`kwargs` (={describe(kwargs)}) must be a dict of keyword arguments, or None.")
        check_names("kwargs", kwargs or {})
        if input_dtype is not None and not isinstance(input_dtype, torch.dtype):
            raise TypeError(
                f"`input_dtype` (={describe(input_dtype)}) must be a dtype, such as torch.float32, or None."
            )
        check_bool(is_prepared=is_prepared, needs_input=needs_input)
        if schedule.ambiguous is not None and isinstance(x, Tensor) and x.dim() == 3:
            raise unclear_split_dim(schedule.ambiguous, x)
        if is_prepared:
            streams, reads = prepare(x, schedule.split_dim, schedule.num_streams, None)[0], input_dtype
        else:
            coupling = schedule.segments[0][1].half_blocks[0].coupling
            streams, reads = begin(x, schedule.split_dim, schedule.num_streams, coupling)
        return run_recorded(
            schedule.segments, streams, args, dict(kwargs or {}), reads, self._keeper, needs_input=needs_input
        )
