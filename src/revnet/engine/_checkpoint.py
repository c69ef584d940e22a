"""Keeping what functions read, and computing again what is inside them.

Where `Rebuilder` rebuilds the input of a function, this keeps it: the same slots in the graph, the same care around the
second run, but no walk and no rounding. What a function computes after the last tensor that autograd saved is not
computed again; for two convolutions or two linear layers that is the second one.

References:
    Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revnet._types import Streams
from revnet.engine._careful import check_finished
from revnet.engine._chain import BoundChain, HalfBlock, run_half_blocks, stored
from revnet.engine._device_digest import WAITING_INTERVAL
from revnet.engine._drift import meter_is_quiet
from revnet.engine._range import RangeWatch
from revnet.engine._record import RecordedCall
from revnet.engine._replay import replay
from revnet.engine._surroundings import Surroundings
from revnet.engine._tensors import tensors_in, version_of, versions_of
from revnet.engine._tracing import refuse, runs_plainly
from revnet.engine.compile import compiled
from revnet.errors import ReconstructionError


def checkpointed(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Run half-blocks and keep the stream that each one reads; the backward pass computes the rest again.

    Arguments, results and errors are the ones of `stored`.

    Numerics:
        Output and gradients are the ones of `stored`, bit for bit, where the functions are deterministic.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return stored(chain, streams)
    if torch.compiler.is_dynamo_compiling():
        return _compiled_one_by_one(chain, streams)
    run = _KeepingRun(chain, streams)

    def advance(index: int, streams: list[Tensor]) -> None:
        run.advance(chain, index, streams)

    return run_half_blocks(chain, list(streams), advance)


def _compiled_one_by_one(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Trace each half-block as a chain of its own, which keeps what it reads."""
    running = tuple(streams)
    for index in range(len(chain.half_blocks)):
        alone = chain.part(index, index + 1)
        # `compiled` returns None as long as nothing wants a gradient.
        running = compiled(alone, running) or stored(alone, running)
    return running


class _KeepingRun:
    """One forward pass through a chain, which keeps what each function reads.

    What a function read is kept by its slots, so that it goes as soon as the backward pass has used them.
    """

    def __init__(self, chain: BoundChain, streams: Sequence[Tensor]):
        # The log-determinants of `chain` have nodes that lead back to this run (rule 1).
        self._chain = chain.for_replays()
        self._surroundings = Surroundings.of(chain.tensors(), streams)
        self._calls: list[tuple[HalfBlock, RecordedCall]] = []
        self._range = RangeWatch() if chain.chain.has_exact else None
        self._has_log_dets = chain.log_dets is not None
        chain.chain.num_runs += 1
        # On a GPU, reading a value waits for all that was launched before it.
        can_read = streams[0].device.type == "cpu" or chain.chain.num_runs % WAITING_INTERVAL == 1
        self._keeps_tail = can_read and not meter_is_quiet()
        self._filled: int | None = None
        self.is_finished = True
        self.lock = threading.RLock()

    def advance(self, chain: BoundChain, index: int, streams: list[Tensor]) -> None:
        """Run the next half-block on `streams`, keeping none of its activations."""
        half_block, plans = chain.half_blocks[index], chain.chain.plans
        source, stream = streams[half_block.source], streams[half_block.target]
        if chain.chain.blocks is not None or not half_block.coupling.is_additive:
            # Hooks and couplings may draw random numbers, and hooks change autocast.
            self._surroundings.refresh()
        call = RecordedCall(half_block.name, plans[index], half_block.function, self._surroundings)
        plans[index] = call.plan
        self._calls.append((half_block, call))
        # Until what it read is kept, below, this call cannot be replayed.
        self.is_finished = False
        if half_block.coupling.is_additive:
            residual = call.record(
                self,
                index,
                chain.call,
                (half_block, source),
                (source,),
                may_stop_early=True,  # A replay has no use for the result (rule 7).
                keeps_tail=self._keeps_tail,
            )
            y = chain.join(half_block, stream, residual)
            kept: tuple[Tensor, ...] = (source,)
        else:
            # With the coupling, which saves the stream for its gradient.
            y = call.record(
                self,
                index,
                lambda: chain.join(half_block, stream, chain.call(half_block, source), chain.log_dets),
                (),
                (source, stream),
                may_stop_early=True,
                keeps_tail=self._keeps_tail,
            )
            kept = (source, stream)
        self.is_finished = True
        if (saved := call.saved()) is not None:
            # `detach` drops the node, which may lead back to the slots (rule 1), and shares the version: writes show.
            saved.kept = [(each.detach(), version_of(each), each.requires_grad) for each in kept]
        if self._range is not None:
            self._range.look(half_block, y)
        streams[half_block.target] = y

    def rebuild(self, index: int) -> None:
        """Run function `index` again on what it read."""
        check_finished(self.is_finished)
        self._surroundings.look_at_random_states(self._calls[0][1].before)
        if self._range is not None:
            self._range.check_waiting()
        # One function's activations at a time, even where the last one's were not read (rule 3).
        if self._filled is not None and (filled := self._calls[self._filled][1].saved()) is not None:
            filled.tensors = filled.versions = None
        self._filled = index
        half_block, call = self._calls[index]
        leaves = []
        saved = call.saved()
        for tensor, version, requires_grad in () if saved is None or saved.kept is None else saved.kept:
            if version_of(tensor) != version:
                raise ReconstructionError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"the stream that `{half_block.name}` read, of shape {tuple(tensor.shape)}, is at version "
                    f"{version_of(tensor)}; expected version {version} instead. Use the operation's out-of-place form."
                )
            # `data` has a version of its own, 0: otherwise each saved input would look as if it had been written to.
            leaves.append(tensor.data.requires_grad_(requires_grad))
        chain = self._chain
        if half_block.coupling.is_additive:
            replay(call, chain.call, (half_block, leaves[0]), fill=True, rounded=None, needs_result=False)
            return
        # Computed again for what autograd saves of it; nobody reads the sum.
        log_dets: list[Tensor] | None = [] if self._has_log_dets else None
        replay(
            call,
            lambda: chain.join(half_block, leaves[1], chain.call(half_block, leaves[0]), log_dets),
            (),
            fill=True,
            rounded=None,
            needs_result=False,
        )


def checkpointed_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module and keep its arguments; the backward pass computes its activations again.

    As `torch.utils.checkpoint` does, but buffers such as batch-norm statistics count once.

    Raises:
        RuntimeError: The module modified an argument in place.
        ReconstructionError: In the backward pass, the activations cannot be computed again.
        NotImplementedError: Under `torch.compile`.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return module(*args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        refuse(
            f"a {type(module).__name__} whose activations are computed again cannot be compiled whole; give it the "
            "policy `Store()` before compiling, or compile the residual functions instead."
        )
    return _KeptCall(module, args, kwargs).run()


class _KeptCall:
    """One call of a module, able to be replayed since its arguments are kept."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._module = module
        self._args = args
        self._kwargs = kwargs
        self._tensors = tensors_in(args, kwargs)
        # The tail is not compared on a GPU, where reading waits: a single call has no runs of which to take each 64th.
        self._is_on_cpu = all(tensor.device.type == "cpu" for tensor in self._tensors)
        surroundings = Surroundings.of(self._tensors, ())
        self._call = RecordedCall(type(module).__name__, None, module, surroundings)
        self.is_finished = False
        self.lock = threading.RLock()

    def run(self) -> Any:
        """Compute for the first time."""
        # Looked at here: in the backward pass, the check of versions would say that it was the caller.
        versions = versions_of(self._tensors)
        result = self._call.record(self, 0, self._compute, (), may_stop_early=True, keeps_tail=self._is_on_cpu)
        if versions != versions_of(self._tensors):
            raise RuntimeError(
                f"{type(self._module).__name__} modified an argument in place, so that its activations cannot be "
                "computed again; use the out-of-place form of its first operation (`inplace=False`), or the policy "
                "`Store()`."
            )
        self.is_finished = True
        return result

    def rebuild(self, index: int) -> None:
        """Compute again."""
        check_finished(self.is_finished)
        self._call.surroundings.look_at_random_states(self._call.before)
        replay(self._call, self._compute, (), fill=True, rounded=None, needs_result=False)

    def _compute(self) -> Any:
        return self._module(*self._args, **self._kwargs)
