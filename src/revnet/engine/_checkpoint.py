"""Keep the inputs of residual functions, and recompute their activations in the backward pass.

Where `Rebuilder` rebuilds the input of a function, the classes here keep it. The slots in the graph and the checks of
the second run are the same, but it neither walks streams back nor adds rounding. Operations after the last tensor that
autograd saved are not repeated. In a function with two convolutions or two linear layers, that is the second one.

References:
    Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost.
"""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from revnet._torch_internals import is_vmapped
from revnet._types import Streams
from revnet.engine._arguments import Arguments
from revnet.engine._capture import check_warmed_up
from revnet.engine._careful import check_finished, modified_stream
from revnet.engine._chain import BoundChain, HalfBlock, run_half_blocks, stored
from revnet.engine._device_digest import WAITING_INTERVAL
from revnet.engine._drift import meter_is_quiet
from revnet.engine._plan import Plan
from revnet.engine._range import RangeWatch
from revnet.engine._record import RecordedCall
from revnet.engine._replay import replay
from revnet.engine._sums import read_source
from revnet.engine._surroundings import Surroundings
from revnet.engine._tensors import version_of, versions_of
from revnet.engine._tracing import refuse, runs_plainly
from revnet.engine.compile import compiled


def checkpointed(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Run the half-blocks and keep the stream that each function reads; the backward pass recomputes the rest.

    The arguments, results and errors are as for `stored`.

    Numerics:
        The output and the gradients equal the ones of `stored` bit for bit if the functions are deterministic.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return stored(chain, streams)
    if torch.compiler.is_dynamo_compiling():
        return _compiled_one_by_one(chain, streams)
    if is_vmapped():
        return stored(chain, streams)
    run = _KeepingRun(chain, streams)

    def advance(index: int, streams: list[Tensor]) -> None:
        run.advance(chain, index, streams)

    return run_half_blocks(chain, list(streams), advance)


def _compiled_one_by_one(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Trace each half-block as a chain of its own, which keeps its inputs."""
    running = tuple(streams)
    for index in range(len(chain.half_blocks)):
        alone = chain.part(index, index + 1)
        # `compiled` returns None if nothing requires a gradient.
        running = compiled(alone, running) or stored(alone, running)
    return running


class _KeepingRun:
    """One forward pass through a chain, which keeps the input of each function.

    The slots of a function hold its inputs, which are freed as soon as the backward pass has used them.
    """

    def __init__(self, chain: BoundChain, streams: Sequence[Tensor]):
        # The nodes of the caller's log-determinants lead back to this run (rule 1).
        self._chain = chain.for_replays()
        self._surroundings = Surroundings.of(self._chain.replayed, streams)
        self._calls: list[tuple[HalfBlock, RecordedCall]] = []
        if is_captured := self._surroundings.is_captured:
            check_warmed_up(chain.half_blocks, chain.chain.plans)
        self._range = RangeWatch(is_captured=is_captured) if chain.chain.has_exact else None
        self._has_log_dets = chain.log_dets is not None
        chain.chain.num_runs += 1
        # On a GPU, reading a value waits for all kernels launched before it.
        can_read = streams[0].device.type == "cpu" or chain.chain.num_runs % WAITING_INTERVAL == 1
        self._keeps_tail = can_read and not is_captured and not meter_is_quiet()
        self._filled: int | None = None
        self.is_finished = True
        self.lock = threading.RLock()

    def advance(self, chain: BoundChain, index: int, streams: list[Tensor]) -> None:
        """Run the next half-block on `streams`, and keep none of its activations."""
        half_block, plans = chain.half_blocks[index], chain.chain.plans
        source, stream = read_source(streams, half_block.source), streams[half_block.target]
        if chain.chain.may_draw:
            half_block = chain.chain.prepare(half_block, streams, self._surroundings)
        call = RecordedCall(half_block.name, plans[index], half_block.function, self._surroundings)
        plans[index] = call.plan
        self._calls.append((half_block, call))
        # This call cannot be replayed until its inputs are kept, below.
        self.is_finished = False
        if half_block.coupling.is_linear:
            residual = call.record(
                self,
                index,
                chain.call,
                (half_block, source),
                (source, *self._chain.inputs),
                may_stop_early=True,  # A replay does not need the result (rule 7).
                keeps_tail=self._keeps_tail,
            )
            y = chain.join(half_block, stream, residual, chain.log_dets)
            kept: tuple[Tensor, ...] = (source,)
        else:
            # Includes the coupling, which saves the stream for its gradient.
            y = call.record(
                self,
                index,
                lambda: chain.join(half_block, stream, chain.call(half_block, source), chain.log_dets),
                (),
                (source, stream, *self._chain.inputs),
                may_stop_early=True,
                keeps_tail=self._keeps_tail,
            )
            kept = (source, stream)
        self.is_finished = True
        if (saved := call.saved()) is not None:
            # `detach` drops the node, which may lead back to the slots (rule 1), and shares the version, which shows
            # writes.
            saved.kept = [(tensor.detach(), version_of(tensor), tensor.requires_grad) for tensor in kept]
        if self._range is not None:
            self._range.look(half_block, y)
        streams[half_block.target] = y

    def rebuild(self, index: int) -> None:
        """Run function `index` again on its inputs."""
        check_finished(self.is_finished)
        self._surroundings.look_at_random_states(self._calls[0][1].before)
        if self._range is not None:
            self._range.check_waiting()
        # One function's activations at a time, even if the slots of the last one were not read (rule 3).
        if self._filled is not None and (filled := self._calls[self._filled][1].saved()) is not None:
            filled.tensors = filled.versions = None
        self._filled = index
        half_block, call = self._calls[index]
        leaves = []
        saved = call.saved()
        for tensor, version, requires_grad in () if saved is None or saved.kept is None else saved.kept:
            if version_of(tensor) != version:
                raise modified_stream(half_block.name, tensor, version)
            # `data` has its own version counter, which is 0; otherwise every saved input would look modified.
            leaves.append(tensor.data.requires_grad_(requires_grad))
        chain = self._chain
        if half_block.coupling.is_linear:
            replay(call, chain.call, (half_block, leaves[0]), fill=True, is_rounded=False, needs_result=False)
            return
        # Recomputed for the tensors that autograd saves; the sum is not read.
        log_dets: list[Tensor] | None = [] if self._has_log_dets else None
        replay(
            call,
            lambda: chain.join(half_block, leaves[1], chain.call(half_block, leaves[0]), log_dets),
            (),
            fill=True,
            is_rounded=False,
            needs_result=False,
        )


def checkpointed_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module and keep its arguments; the backward pass recomputes its activations.

    This is like `torch.utils.checkpoint`, but buffers such as batch-norm statistics are updated only once.

    Raises:
        RuntimeError: The module modified an argument in place.
        ReconstructionError: In the backward pass, the activations cannot be recomputed.
        NotImplementedError: The call runs under `torch.compile`.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return module(*args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        refuse(
            f"a {type(module).__name__} whose activations are recomputed cannot be compiled as a whole; give it the "
            "policy `Store()` before compiling, or compile the residual functions instead."
        )
    if is_vmapped():
        return module(*args, **kwargs)
    return _KeptCall(module, args, kwargs).run(args, kwargs)


class StandIn(nn.Module):
    """A module that is created for a single call, and runs the forward pass of `owner` without its hooks."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner = owner


class _Learned:
    """What the plans of earlier calls of a module have learned. It refers to no module, and keeps none alive."""

    _MOST = 16
    """Number of structures of one module that are remembered, such as those in training and in evaluation."""

    def __init__(self) -> None:
        self._of_structure: dict[tuple[Any, ...], tuple[int, list[int], set[int], list[int]]] = {}

    def teach(self, plan: Plan) -> None:
        """Pass on to the plan of the next call what plans of the same structure have learned."""
        if (known := self._of_structure.get((*plan.types, *plan.training))) is not None:
            plan.num_calls, plan.data_writes, plan.constants, plan.statistics = known

    def learn(self, plan: Plan) -> None:
        """Remember what a plan has learned."""
        known = plan.num_calls, plan.data_writes, plan.constants, plan.statistics
        self._of_structure[(*plan.types, *plan.training)] = known
        if len(self._of_structure) > self._MOST:
            del self._of_structure[next(iter(self._of_structure))]


_learned: WeakKeyDictionary[nn.Module, _Learned] = WeakKeyDictionary()


class _KeptCall:
    """One call of a module, which can be replayed because its arguments are kept."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._module = module
        self._arguments = Arguments(args, kwargs)
        surroundings = Surroundings.of(self._arguments, ())
        self._call = RecordedCall(module._get_name(), None, module, surroundings)
        # A plan refers to the module, which would never be freed if it kept its plan.
        self._learned = _learned.setdefault(module.owner if isinstance(module, StandIn) else module, _Learned())
        self._learned.teach(self._call.plan)
        self.is_finished = False
        self.lock = threading.RLock()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module for the first time."""
        call, kept, inputs = self._call, self._arguments.kept, self._arguments.inputs
        self._arguments.close()
        # Checked here: in the backward pass, the check of versions would blame the caller.
        versions = versions_of(kept)
        # On a GPU, reading a value waits for all kernels launched before it.
        can_read = all(tensor.device.type == "cpu" for tensor in kept) or call.plan.num_calls % WAITING_INTERVAL == 0
        result = call.record(
            self,
            0,
            partial(self._module, *args, **kwargs),
            (),
            inputs,
            may_stop_early=True,
            keeps_tail=can_read and not call.surroundings.is_captured,
        )
        self._learned.learn(call.plan)
        if versions != versions_of(kept):
            raise RuntimeError(
                f"`{self._module._get_name()}` modified an argument in place, so its activations cannot be "
                "recomputed; use the out-of-place form of its first operation (`inplace=False`), or the policy "
                "`Store()`."
            )
        self.is_finished = True
        return result

    def rebuild(self, index: int) -> None:
        """Recompute the activations."""
        check_finished(self.is_finished)
        self._call.surroundings.look_at_random_states(self._call.before)
        args, kwargs = self._arguments.again()
        function = partial(self._module, **kwargs)
        replay(self._call, function, args, fill=True, is_rounded=False, needs_result=False)
