"""The half-block of most networks: an additive one, of which the slots hold the function alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revnet.coupling import Additive
from revnet.engine._chain import BoundChain, HalfBlock, wrote_to_input
from revnet.engine._replay import replay
from revnet.engine._step import AbstractStep
from revnet.engine._snapshot import StreamSnapshot
from revnet.engine._tensors import is_only_owner

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


class AdditiveStep(AbstractStep):
    """A half-block whose coupling saves nothing for its gradient."""

    __slots__ = ()

    def first(
        self, run: "Rebuilder", chain: BoundChain, index: int, half_block: HalfBlock, streams: Sequence[Tensor]
    ) -> Tensor:
        """Return the updated stream, leaving slots of the function in the graph."""
        self.half_block = half_block
        source, stream = streams[half_block.source], streams[half_block.target]
        self.source_requires_grad = source.requires_grad
        is_lowest = run.first_with_slots is None
        function: Callable[..., Any] = chain.call
        args: tuple[Any, ...] = (half_block, source)
        kwargs: Mapping[str, Any] = {}
        is_plain = chain.input_dtype is None and not chain.own_kwargs and half_block.takes_arguments
        if is_plain:  # `chain.call` without its questions.
            function, args, kwargs = half_block.function, (source, *chain.args), chain.kwargs
        version = source._version
        residual = self.record(
            run,
            index,
            function,
            args,
            kwargs,
            (source,),
            may_stop_early=is_lowest,
            keeps_tail=is_lowest and run.is_watched,
        )
        if is_plain and source._version != version:
            raise wrote_to_input(half_block)
        # What the coupling would do, without its checks, which cost more than the sum of small tensors.
        if (
            type(half_block.coupling) is Additive
            and type(residual) is Tensor
            and residual.dtype == stream.dtype
            and residual.shape == stream.shape
        ):
            return stream + residual
        return half_block.coupling.forward(stream, residual, half_block.name)

    def undo(self, run: "Rebuilder", streams: StreamSnapshot, *, fill: bool) -> None:
        """Run the function again, and take what it returns off the stream."""
        index, half_block = streams.position - 1, self.half_block
        is_needed = index > run.lowest
        residual = self._run_again(run, streams, index, fill=fill, needs_result=is_needed)
        if not is_needed:
            return
        y = streams.take(half_block.target)
        try:
            in_place = is_only_owner(y)
            if type(half_block.coupling) is Additive and residual.dtype == y.dtype and type(y) is Tensor:
                x = y.sub_(residual) if in_place else y - residual
            else:
                x = half_block.coupling.inverse(y, residual, half_block.name, in_place=in_place)
        except BaseException:
            streams.put(half_block.target, y)
            raise
        streams.put(half_block.target, x)
        streams.position = index

    def refill(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again on the stream that it read, which undoing it has left as it was."""
        self._run_again(run, streams, index, fill=True, needs_result=False)

    def rerun(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again on the stream that it read."""
        self._run_again(run, streams, index, fill=False, needs_result=False)

    def redo(self, run: "Rebuilder", streams: StreamSnapshot) -> Tensor:
        """Return the stream with what the function returns."""
        residual = self._run_again(run, streams, streams.position, fill=False, needs_result=True)
        return self.half_block.coupling.forward(streams.read(self.half_block.target), residual, self.half_block.name)

    def _run_again(
        self, run: "Rebuilder", streams: StreamSnapshot, index: int, *, fill: bool, needs_result: bool
    ) -> Any:
        source, rounded = self.source_of(run, streams, index)
        chain, half_block = run.chain, self.half_block
        function: Callable[..., Any] = chain.call
        args: tuple[Any, ...] = (half_block, source)
        kwargs: Mapping[str, Any] = {}
        is_plain = chain.input_dtype is None and not chain.own_kwargs and half_block.takes_arguments
        if is_plain:
            function, args, kwargs = half_block.function, (source, *chain.args), chain.kwargs
        residual = replay(self, function, args, kwargs, fill=fill, rounded=rounded, needs_result=needs_result)
        if is_plain and source._version:
            raise wrote_to_input(half_block)
        return residual.detach() if residual is not None and torch.is_grad_enabled() else residual
