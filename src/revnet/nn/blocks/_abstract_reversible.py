"""The inverse and the log-determinants of reversible blocks and sequences."""

import abc
from typing import Any, overload

from torch import Tensor, nn

from revnet._types import Streams, TensorPair
from revnet.engine import Chain
from revnet.nn.blocks._run import run_inverse, sum_log_dets
from revnet.nn.blocks._schedule import Schedule
from revnet.nn.blocks._split_dim import unclear_split_dim


class AbstractReversible(nn.Module, abc.ABC):
    """A reversible block, or a sequence of them: a module whose input can be computed from its output."""

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
