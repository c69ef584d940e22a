"""The probe, which runs the functions of a program on fake tensors to find out what they do.

`torch.compile` traces with fake tensors, which have shapes but no values. The functions run on them when the forward
operator is traced for the first time. This shows which functions draw random numbers, which of them write to which
buffers, and which parameters their results depend on. A function that later behaves differently raises.
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
from revnet._torch_release import without_compiled_functions
from revnet._types import TensorPair
from revnet.engine._tensors import storage_key
from revnet.engine._tracing import CannotCompileError, refuse_other_results
from revnet.engine.compile._flow import leaves_of_result
from revnet.engine.compile._program import NUM_STREAMS, Called, Findings, Program, Reach, Step
from revnet.engine.compile._side_effects import Attributes, check_attributes, check_no_graph_left, drawing_coupling


def probe(program: Program, inputs: Sequence[Tensor], buffers: Sequence[Tensor], wanted: Sequence[bool]) -> TensorPair:
    """Run a program on fake tensors, and store what its functions do if that is not known yet.

    Args:
        program: The program.
        inputs: Both streams, the arguments and the parameters.
        buffers: The buffers of all functions. Not modified.
        wanted: For each of `inputs`, whether it requires a gradient.

    Returns:
        The streams after the last step.

    Raises:
        CannotCompileError: A function has a side effect that would not reach the caller, or writes to a parameter or an
            argument.
    """
    streams = list(inputs[:NUM_STREAMS])
    # Functions that are compiled themselves run uncompiled here. The compiler would meet their code under a dispatch
    # mode, skip it, and not try it again.
    with without_compiled_functions():
        # The shapes are needed each time the forward operator is traced, so the functions run each time.
        findings = [_probe_step(program, step, streams, inputs, buffers, wanted) for step in program.steps]
    # Only once: the traced code already treats the first findings as constants.
    if program.findings is None:
        changed = {position for finding in findings for position in finding.changed}
        is_constant = [position not in changed for position in range(len(buffers))]
        ends = [f"{stream.dtype} {stream.shape} {stream.stride()}" for stream in streams]
        program.findings = Findings(
            [finding.draws for finding in findings], is_constant, [finding.reach for finding in findings], ends
        )
    return streams[0], streams[1]


class _Found:
    """Findings of the probe about one step."""

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
    copies = [buffer.clone() for buffer in buffers]  # With their own storages, so that each write is detected.
    watch = _Watch()
    try:
        with autograd_in_operators(), torch.enable_grad(), fakes_for_a_trial(source), watch:
            # Whether or not its gradient is needed, because the reach must show what the residual depends on.
            called = program.call(step, source.requires_grad_(), leaves, copies)
        refuse_other_results(step.name, called.residual)
        _check_only_the_first_call_writes(program, step, source, leaves, copies, before)
        streams[step.target] = _join(program, step, streams[step.target].detach(), called.residual.detach())
    except depends_on_values():
        # Such a function could do anything, so the probe assumes everything.
        streams[step.target] = torch.empty_like(streams[step.target])
        everything = Reach(tuple(position for position in leaves if wanted[position]), source=True)
        return _Found(True, set(program.buffer_positions[step.function]), everything)
    finally:
        before.put_back()  # Fake tensors must not remain in caches.
    changed = _changed_buffers(program, step, called, copies, watch)
    _check_only_buffers_are_written(step, leaves, watch)
    finding = _Found(watch.draws, changed, _reach(called.residual, source, leaves))
    watched = [weakref.ref(leaf) for leaf in (source, *leaves.values()) if leaf.requires_grad]
    del called, source, leaves
    check_no_graph_left(step.name, watched, program.cyclic)
    return finding


def _join(program: Program, step: Step, x: Tensor, residual: Tensor) -> Tensor:
    """Return the stream combined with a residual, and raise for a coupling that the operators cannot run."""
    watch = _Watch()
    with autograd_in_operators(), torch.enable_grad(), fakes_for_a_trial(x), watch:
        y = step.coupling.forward(x, residual, step.name)
        log_det = program.log_det(step, x, residual)
    if watch.draws:
        raise drawing_coupling(step.name)
    if y.requires_grad or (log_det is not None and log_det.requires_grad):
        raise CannotCompileError(
            f"the coupling of `{step.name}` uses a tensor that requires a gradient, which a compiled reversible "
            "sequence would lose; use it in a residual function, or store the block's activations with the policy "
            "`Store()`."
        )
    return y


def _check_only_the_first_call_writes(
    program: Program,
    step: Step,
    source: Tensor,
    leaves: dict[int, Tensor],
    buffers: Sequence[Tensor],
    before: Attributes,
) -> None:
    """Raise for a function that changes attributes in every call; a cache is filled only in the first call."""
    if before.changed() is None:
        return
    # Now the cache holds fake tensors. A function that does not change them this time will not change real ones.
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
        # Kernels update running statistics without raising the version, so no vector is trusted to be constant.
        if position in called.rebound or watch.has_written(copies[position]) or copies[position].dim() <= 1
    }


def _check_only_buffers_are_written(step: Step, leaves: dict[int, Tensor], watch: "_Watch") -> None:
    if any(watch.has_written(leaf) for leaf in leaves.values()):
        raise CannotCompileError(
            f"`{step.name}` writes to a parameter or an argument, which a compiled reversible sequence cannot repeat; "
            "store its block's activations with the policy `Store()`."
        )


def _reach(residual: Tensor, source: Tensor, leaves: dict[int, Tensor]) -> Reach:
    """Return the leaves on which a residual depends."""
    reached_leaves = leaves_of_result(residual)
    reached = tuple(position for position, leaf in leaves.items() if id(leaf) in reached_leaves)
    return Reach(reached, id(source) in reached_leaves)


class _Watch(TorchDispatchMode):
    """Detects random operations, and the storages that are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = False
        self._written: set[int | None] = set()

    def has_written(self, tensor: Tensor) -> bool:
        """Return whether the memory of a tensor was written to."""
        return storage_key(tensor) in self._written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = {argument.name: argument.default_value for argument in func._schema.arguments}
        values.update(zip(values, args, strict=False))
        values.update(kwargs or {})
        # Attention draws random numbers only with dropout, which its tag does not show.
        is_off = values.get("dropout_p") == 0 or values.get("train") is False or values.get("training") is False
        if torch.Tag.nondeterministic_seeded in func.tags and not is_off:
            self.draws = True
        for argument in func._schema.arguments:
            if argument.is_write:
                written = tree_leaves(values.get(argument.name))
                self._written |= {storage_key(tensor) for tensor in written if isinstance(tensor, Tensor)}
        return func(*args, **(kwargs or {}))
