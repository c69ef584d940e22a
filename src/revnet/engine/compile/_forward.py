"""The forward pass of a program, which keeps no activations."""

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revnet._torch_internals import autograd_in_operators
from revnet.engine._random import get_random_state, same_random_state
from revnet.engine._range import check_magnitude, is_bound_by_range
from revnet.engine._tensors import version_of
from revnet.engine.compile._flow import first_step, has_compiled_part, leaves_of_result, lost_gradient, reached
from revnet.engine.compile._kept import devices_of, keep, pack
from revnet.engine.compile._program import NUM_STREAMS, Program, Step
from revnet.engine.compile._side_effects import check_no_graph_left, drawing_coupling
from revnet.errors import ReconstructionError

Results = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]
"""Both streams (empty if no step updates them), the log-determinant, the kept bytes, and the changed buffers."""


class ForwardPass:
    """One forward pass.

    Args:
        program: The program.
        inputs: Both streams, the arguments and the parameters.
        buffers: The buffers of all functions. Not modified.
        wanted: For each of `inputs`, whether it requires a gradient.
    """

    def __init__(self, program: Program, inputs: list[Tensor], buffers: list[Tensor], wanted: list[bool]):
        self._program = program
        self._inputs = inputs
        self._wanted = wanted
        self._is_constant = program.known_findings.is_constant
        self._buffers = [
            buffer if constant else buffer.clone() for buffer, constant in zip(buffers, self._is_constant, strict=True)
        ]
        self._devices = devices_of(inputs[0], inputs[NUM_STREAMS:])
        self._streams = inputs[:NUM_STREAMS]
        self._log_det = program.no_log_det(inputs[0])
        self._kept: list[Tensor] = []
        self._first = first_step(program, reached(program, wanted, [True, True, program.has_log_det]))

    def run(self) -> Results:
        """Run all steps."""
        x1 = self._inputs[0]
        for index, step in enumerate(self._program.steps):
            residual = self._residual(index, step)
            self._join(index, step, residual)
            del residual  # Frees its memory for the next function.
        # An operator must not return its inputs, so a stream that no step updates is left out.
        y1, y2 = (self._streams[number] if number in self._program.targets else x1.new_empty(0) for number in (0, 1))
        changed = [buffer for buffer, constant in zip(self._buffers, self._is_constant, strict=True) if not constant]
        return y1, y2, self._log_det, pack(self._kept, x1.device), changed

    def _residual(self, index: int, step: Step) -> Tensor:
        """Call the function of a step, and check that it does what the probe saw."""
        program = self._program
        draws = program.known_findings.draws[index]
        random_states = [get_random_state(device) for device in self._devices]
        self._kept += keep(program, step, draws, random_states, self._buffers)
        source = self._streams[step.source].detach().requires_grad_()
        leaves = program.leaves(step, self._inputs, self._wanted)
        guarded = [*leaves.values(), *(b for b, c in zip(self._buffers, self._is_constant, strict=True) if c)]
        versions = [version_of(tensor) for tensor in guarded]
        # With gradients, so that the same kernels run as in the replay; saved tensors are dropped at once.
        with autograd_in_operators(), torch.enable_grad(), saved_tensors_hooks(lambda _: None, _nothing_saved):
            residual, rebound = program.call(step, source, leaves, self._buffers)
        # The graph copies each result into the module's own tensor, so a replaced buffer remains the same object.
        for position, value in rebound.items():
            self._buffers[position].copy_(value.detach())
        self._check_reach(index, step, residual, source, leaves)
        residual = residual.detach()
        # Compared with the findings of the probe, since the graph has no room for other states and buffers.
        has_written = versions != [version_of(tensor) for tensor in guarded]
        _check_foreseen(step, not draws and self._has_drawn(random_states), has_written)
        watched = [weakref.ref(leaf) for leaf in (source, *leaves.values()) if leaf.requires_grad]
        del source, leaves, guarded, rebound  # From here on, only tensors that the function keeps refer to the leaves.
        check_no_graph_left(step.name, watched, program.cyclic)
        return residual

    def _check_reach(
        self, index: int, step: Step, residual: Tensor, source: Tensor, leaves: Mapping[int, Tensor]
    ) -> None:
        """Raise if a residual depends on a tensor whose gradient the backward pass would lose without seeing it."""
        reach = self._program.known_findings.reaches[index]
        known = {position for position in leaves if self._wanted[position]}
        # The backward pass finds all other tensors. Almost always this is the case, and the walk is saved.
        if index >= self._first and reach.source and known.issubset(reach.inputs):
            return
        known_leaves = {id(leaves[position]) for position in reach.inputs}
        if reach.source:
            known_leaves.add(id(source))
        found = leaves_of_result(residual)
        unknown = next((leaf for key, leaf in found.items() if key not in known_leaves), None)
        if unknown is not None and not has_compiled_part(residual):
            raise lost_gradient(step.name, unknown, source, list(leaves.values()))

    def _join(self, index: int, step: Step, residual: Tensor) -> None:
        """Update the target stream with a residual."""
        # The coupling of a custom class may draw in some calls only, so that the probe did not see it.
        random_states = [] if step.coupling.is_linear else [get_random_state(device) for device in self._devices]
        # The backward operator differentiates the coupling; nothing is recorded here.
        with torch.no_grad():
            log_det = self._program.log_det(step, self._streams[step.target], residual)
            if log_det is not None:
                self._log_det = self._log_det + log_det
            half_block = self._program.half_block(step)
            if self._first < index < NUM_STREAMS and is_bound_by_range(half_block):  # It will be rebuilt.
                check_magnitude(half_block, self._streams[step.target])
            y = step.coupling.forward(self._streams[step.target], residual, step.name)
            self._streams[step.target] = y
            check_magnitude(half_block, y)
        if random_states and self._has_drawn(random_states):
            raise drawing_coupling(step.name)

    def _has_drawn(self, random_states: Sequence[Tensor]) -> bool:
        return not all(
            same_random_state(state, get_random_state(device))
            for state, device in zip(random_states, self._devices, strict=True)
        )


def _check_foreseen(step: Step, has_drawn: bool, has_written: bool) -> None:
    """Raise if a function did something that the probe did not see, so that its replay would differ."""
    if has_drawn or has_written:
        what = "drew random numbers" if has_drawn else "wrote to a buffer, a parameter or an argument"
        raise ReconstructionError(
            f"`{step.name}` {what}, but did not when it was traced; call `torch.compiler.reset()` after a change of "
            "the function, or, if it does so only sometimes, store its block's activations with the policy `Store()`."
        )


def _nothing_saved(_: None) -> Tensor:
    raise ReconstructionError(
        "a residual function of a compiled reversible sequence differentiates inside itself, which works only without "
        "compilation; compile the residual functions instead: `block.f.compile(); block.g.compile()`."
    )
