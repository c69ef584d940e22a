"""The probe: running the functions of a program once without computing, to find out what they do.

`torch.compile` traces with fake tensors, which have shapes and no values. On those the functions run while the forward
operator is traced for the first time. This tells which of them draw random numbers, which write to which buffers, and
which parameters their results depend on. A function that does otherwise later is noticed and raises.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import (
    TorchDispatchMode,
    autograd_in_operators,
    depends_on_values,
    fakes_for_a_trial,
    tree_leaves,
)
from revnet._types import TensorPair
from revnet.engine._tensors import storage_key
from revnet.engine._tracing import CannotCompileError
from revnet.engine.compile._program import NUM_STREAMS, Called, Findings, Program, Reach, Step
from revnet.engine.compile._side_effects import Attributes, check_attributes, check_no_graph_left


def probe(program: Program, inputs: Sequence[Tensor], buffers: Sequence[Tensor], wanted: Sequence[bool]) -> TensorPair:
    """Run a program on fake tensors, and tell it what its functions do if it does not know yet.

    Args:
        program: The program.
        inputs: Both streams, the arguments and the parameters.
        buffers: The buffers of all functions. Not modified.
        wanted: For each of `inputs`, whether it requires a gradient.

    Returns:
        The streams after the last step.

    Raises:
        CannotCompileError: A function leaves something behind that the caller would not get, or writes to a
            parameter or an argument.
    """
    streams = list(inputs[:NUM_STREAMS])
    # The shapes are needed each time the forward operator is traced, hence functions run each time.
    found = [_probe_step(program, step, streams, inputs, buffers, wanted) for step in program.steps]
    # Once: the traced code has already taken the first findings for constants.
    if program.findings is None:
        changed = {position for each in found for position in each.changed}
        is_constant = [position not in changed for position in range(len(buffers))]
        ends = [f"{stream.dtype} {stream.shape} {stream.stride()}" for stream in streams]
        program.findings = Findings([each.draws for each in found], is_constant, [each.reach for each in found], ends)
    return streams[0], streams[1]


class _Found:
    """What a probe found out about one step."""

    def __init__(self, draws: bool, changed: set[int], reach: Reach):
        self.draws = draws
        self.changed = changed
        self.reach = reach


def _probe_step(
    program: Program,
    step: Step,
    streams: list[Tensor],
    inputs: Sequence[Tensor],
    buffers: Sequence[Tensor],
    wanted: Sequence[bool],
) -> _Found:
    """Run one step, and put the stream that it updates into `streams`."""
    before = Attributes(program.half_block(step).function)
    leaves = program.leaves(step, inputs, wanted)
    source = streams[step.source].detach()
    copies = [buffer.clone() for buffer in buffers]  # With storages of their own, so that each write is known.
    watch = _Watch()
    try:
        with autograd_in_operators(), torch.enable_grad(), fakes_for_a_trial(source), watch:
            # Whether or not its gradient is wanted: the reach is to say on what the residual depends.
            called = program.call(step, source.requires_grad_(), leaves, copies)
        _check_only_the_first_call_writes(program, step, source, leaves, copies, before)
        streams[step.target] = step.coupling.forward(streams[step.target], called.residual.detach(), step.name)
    except depends_on_values():
        # Such a function could do anything, so everything is expected of it.
        streams[step.target] = torch.empty_like(streams[step.target])
        everything = Reach(tuple(position for position in leaves if wanted[position]), source=True)
        return _Found(True, set(program.buffer_positions[step.function]), everything)
    finally:
        before.put_back()  # Fake tensors must not stay in caches.
    changed = _changed_buffers(program, step, called, copies, watch)
    _check_only_buffers_are_written(step, leaves, watch)
    found = _Found(watch.draws, changed, _reach(called.residual, source, leaves))
    watched = [weakref.ref(leaf) for leaf in (source, *leaves.values()) if leaf.requires_grad]
    del called, source, leaves
    check_no_graph_left(step.name, watched, program.cyclic)
    return found


def _check_only_the_first_call_writes(
    program: Program,
    step: Step,
    source: Tensor,
    leaves: dict[int, Tensor],
    buffers: Sequence[Tensor],
    before: Attributes,
) -> None:
    """Raise for a function that changes attributes in every call; a cache is filled in the first one only."""
    if before.changed() is None:
        return
    # Now the cache holds fake tensors. A function that leaves them alone this time will do so with real ones.
    after_one = Attributes(program.half_block(step).function)
    with autograd_in_operators(), torch.enable_grad(), fakes_for_a_trial(source):
        program.call(step, source, leaves, [buffer.clone() for buffer in buffers])
    try:
        check_attributes(step.name, after_one)
    finally:
        after_one.put_back()


def _changed_buffers(
    program: Program, step: Step, called: Called, copies: Sequence[Tensor], watch: "_Watch"
) -> set[int]:
    """Return the positions of the buffers that a step may have written to."""
    return {
        position
        for position in program.buffer_positions[step.function]
        # Kernels write to running statistics without saying so, hence no vector is trusted to be constant.
        if position in called.rebound or watch.has_written(copies[position]) or copies[position].dim() <= 1
    }


def _check_only_buffers_are_written(step: Step, leaves: dict[int, Tensor], watch: "_Watch") -> None:
    if any(watch.has_written(leaf) for leaf in leaves.values()):
        raise CannotCompileError(
            f"`{step.name}` writes to a parameter or an argument, which a compiled reversible sequence cannot repeat; "
            "keep its block's activations with the policy `Store()`."
        )


def _reach(residual: Tensor, source: Tensor, leaves: dict[int, Tensor]) -> Reach:
    """Return the leaves on which a residual depends."""
    found = leaves_of(residual.grad_fn)
    reached = tuple(position for position, leaf in leaves.items() if id(leaf) in found)
    return Reach(reached, id(source) in found)


def leaves_of(node: Any) -> dict[int, Tensor]:
    """Return the leaves that a graph hands gradients to, by their ids; `node` is its end."""
    leaves: dict[int, Tensor] = {}
    # No recursion: a graph may be deeper than the stack of Python.
    remaining, seen = [node], {node}
    while remaining:
        each = remaining.pop()
        if each is None:
            continue
        leaf = getattr(each, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        for following, _ in each.next_functions:
            if following not in seen:
                seen.add(following)
                remaining.append(following)
    return leaves


class _Watch(TorchDispatchMode):
    """Notices random operations, and which storages are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = False
        self._written: set[int | None] = set()

    def has_written(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor was written to."""
        return storage_key(tensor) in self._written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = {argument.name: argument.default_value for argument in func._schema.arguments}
        values.update(zip(values, args, strict=False))
        values.update(kwargs or {})
        # Attention takes its random numbers only if there is a dropout, which its tag does not say.
        is_off = values.get("dropout_p") == 0 or values.get("train") is False or values.get("training") is False
        if torch.Tag.nondeterministic_seeded in func.tags and not is_off:
            self.draws = True
        for argument in func._schema.arguments:
            if argument.is_write:
                written = tree_leaves(values.get(argument.name))
                self._written |= {storage_key(each) for each in written if isinstance(each, Tensor)}
        return func(*args, **(kwargs or {}))
