"""The backward pass of a program, which rebuilds the streams and differentiates one residual function at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from revnet._torch_internals import autograd_in_operators
from revnet.coupling import AbstractCoupling
from revnet.engine._random import get_random_state, set_random_state
from revnet.engine._tensors import is_only_owner, storage_key
from revnet.engine.compile._flow import first_step, leaves_of, lost_gradient, reached
from revnet.engine.compile._kept import Kept, devices_of, unpack
from revnet.engine.compile._program import NUM_STREAMS, Program, Step
from revnet.errors import ReconstructionError


class _Graph(NamedTuple):
    """The graph of one step, with its ends, the gradients of the ends, and its leaves."""

    ends: list[GradientEdge]
    gradients: list[Tensor]
    source: Tensor
    x: Tensor | None
    """Stream that the step updates, as a leaf; None if its gradient passes unchanged."""
    leaves: dict[int, Tensor]
    others: list[Tensor]
    """Tensors among the source and the leaves that must not receive a gradient, because it would be lost."""


class BackwardPass:
    """One backward pass.

    Args:
        program: The program.
        inputs: Both streams after the last step, the arguments and the parameters.
        constants: The buffers that no step writes to.
        state: The bytes that the forward pass kept.
        gradients: The gradients of both streams and of the log-determinant; None for a missing gradient.
        wanted: For each input, whether it requires a gradient.
    """

    def __init__(
        self,
        program: Program,
        inputs: list[Tensor],
        constants: list[Tensor],
        state: Tensor,
        gradients: list[Tensor | None],
        wanted: list[bool],
    ):
        self._program = program
        self._inputs = inputs
        self._wanted = wanted
        self._incoming = gradients
        self._returned = reached(program, wanted, [gradient is not None for gradient in gradients])
        self._devices = devices_of(inputs[0], inputs[NUM_STREAMS:])
        self._buffers = program.buffers_for_replay(constants)
        self._kept = unpack(program, state, self._devices, self._buffers)
        self._streams = [_Stream(stream) for stream in inputs[:NUM_STREAMS]]
        self._gradients: list[Tensor | None] = [*gradients[:NUM_STREAMS], *[None] * (len(inputs) - NUM_STREAMS)]
        self._first = first_step(program, self._returned)

    def run(self) -> list[Tensor]:
        """Walk back to the first step for which a gradient is needed, and return the needed gradients."""
        with _random_states_left_alone(self._devices):
            for index in reversed(range(self._first, len(self._program.steps))):
                step = self._program.steps[index]
                self._restore(step, self._kept[index])
                self._differentiate(index, step, self._rerun(index, step))
        return self._collect()

    def _restore(self, step: Step, kept: Kept) -> None:
        """Set random states and buffers to their values before the step in the forward pass."""
        for device, state in zip(self._devices, kept.random_states, strict=False):  # Empty if it draws nothing.
            set_random_state(device, state)
        for position, value in zip(self._program.kept(step), kept.buffers, strict=True):
            self._buffers[position].copy_(value)

    def _rerun(self, index: int, step: Step) -> _Graph | None:
        """Call the function again, undo the step, and return the graph to differentiate, if there is one."""
        coupling, target = step.coupling, self._streams[step.target]
        source = self._streams[step.source].tensor.detach().requires_grad_()  # Even if only to detect a dependence.
        leaves = self._program.leaves(step, self._inputs, self._wanted)
        with autograd_in_operators(), torch.enable_grad():
            residual, _ = self._program.call(step, source, leaves, self._buffers)
        self._check_graph(index, step, residual)
        if index > self._first or not coupling.is_additive:  # Below the first step, the stream is not read.
            target.undo(residual.detach(), coupling, step.name)
        if coupling.is_additive:
            return self._graph(index, step, [(residual, self._gradients[step.target])], source, None, leaves)
        x = target.tensor.detach().requires_grad_(self._is_wanted(index, step.target))
        with autograd_in_operators(), torch.enable_grad():
            y = coupling.forward(x, residual, step.name)
            log_det = self._program.log_det(step, x, residual)
        results = [(y, self._gradients[step.target]), (log_det, self._incoming[NUM_STREAMS])]
        return self._graph(index, step, results, source, x, leaves)

    def _check_graph(self, index: int, step: Step, residual: Tensor) -> None:
        """Raise if a residual has no graph, although in the probe it depended on inputs that get a gradient."""
        expected = any(self._returned[position] for position in self._program.known_findings.reaches[index].inputs)
        if expected and not residual.requires_grad:
            raise ReconstructionError(
                f"`{step.name}` returned a tensor that does not require a gradient, but did when it was traced; store "
                "its block's activations with the policy `Store()`."
            )

    def _is_wanted(self, index: int, stream: int) -> bool:
        """Return whether a step below `index`, or the caller, needs the gradient of a stream."""
        return index > self._first or self._returned[stream]

    def _graph(
        self,
        index: int,
        step: Step,
        results: Sequence[tuple[Tensor | None, Tensor | None]],
        source: Tensor,
        x: Tensor | None,
        leaves: dict[int, Tensor],
    ) -> _Graph | None:
        # Edges rather than tensors, so that the values of the results are freed before the gradients are computed.
        ends, gradients = [], []
        for result, gradient in results:
            if result is not None and gradient is not None and result.requires_grad:
                ends.append(get_gradient_edge(result))
                # A residual may have a lower precision than its stream, and than the gradient of the stream.
                gradients.append(gradient.to(result.dtype))
        if not ends:
            return None
        others = self._other_leaves(index, step, ends, source, x, leaves)
        return _Graph(ends, gradients, source, x, leaves, others)

    def _other_leaves(
        self,
        index: int,
        step: Step,
        ends: Sequence[GradientEdge],
        source: Tensor,
        x: Tensor | None,
        leaves: dict[int, Tensor],
    ) -> list[Tensor]:
        """Return the tensors that must not receive a gradient, and raise if a result depends on a tensor from outside.

        The graph of a compiled function leads to all that it read. Only its gradients show what it depends on.
        """
        known = {id(leaf) for position, leaf in leaves.items() if self._returned[position]}
        known.add(id(x))
        if self._program.known_findings.reaches[index].source:
            known.add(id(source))
        found = {key: leaf for end in ends for key, leaf in leaves_of(end.node).items() if key not in known}
        own = {id(leaf) for leaf in (source, *leaves.values())}
        for key, leaf in found.items():
            if key not in own:
                raise lost_gradient(step.name, leaf, source, list(leaves.values()))
        return list(found.values())

    def _differentiate(self, index: int, step: Step, graph: _Graph | None) -> None:
        """Add the gradients of one step to the gradients of the streams, the arguments and the parameters."""
        if graph is None:
            return
        ends, gradients, source, x, leaves, others = graph
        inputs = {position: leaf for position, leaf in leaves.items() if self._returned[position]}
        if self._is_wanted(index, step.source) and self._program.known_findings.reaches[index].source:
            inputs[step.source] = source
        if x is not None:
            self._gradients[step.target] = None  # The coupling turns it into the gradient of `x`.
            if x.requires_grad:
                inputs[step.target] = x
        if not (inputs or others):
            return
        new_gradients = torch.autograd.grad(ends, [*inputs.values(), *others], gradients, allow_unused=True)
        for leaf, gradient in zip(others, new_gradients[len(inputs) :], strict=True):
            if gradient is not None:
                raise lost_gradient(step.name, leaf, source, list(leaves.values()))
        positions = list(inputs)
        del graph, ends, gradients, source, x, leaves, others, inputs  # Frees the graph's memory for the sums.
        for position, gradient in zip(positions, new_gradients, strict=False):
            self._gradients[position] = _sum(self._gradients[position], gradient)

    def _collect(self) -> list[Tensor]:
        """Return the gradients in the layout that the graph expects."""
        results = []
        # An operator must not return a tensor twice, or return one of its inputs.
        seen = {storage_key(gradient) for gradient in self._incoming if gradient is not None}
        metas = gradient_metas(self._inputs, self._incoming, self._returned)
        returned = [gradient for gradient, is_wanted in zip(self._gradients, self._returned, strict=True) if is_wanted]
        for meta, gradient in zip(metas, returned, strict=True):
            result = _laid_out_as(meta, gradient)
            results.append(result.clone() if storage_key(result) in seen else result)
            seen.add(storage_key(result))
        return results


class _Stream:
    """A stream that is walked back. Its first tensor belongs to the graph; later ones may be overwritten."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._is_own = False

    def undo(self, residual: Tensor, coupling: AbstractCoupling, name: str) -> None:
        """Invert the coupling for one residual."""
        in_place = self._is_own and is_only_owner(self.tensor)
        self.tensor = coupling.inverse(self.tensor, residual, name, in_place=in_place)
        self._is_own = True


def gradient_metas(
    inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], returned: Sequence[bool]
) -> list[Tensor]:
    """Return, for each input whose gradient is returned, a tensor with its shape, dtype and layout."""
    # The final value of a stream that is not read is not kept, but then the stream has a gradient.
    streams = [
        stream if gradient is None else gradient
        for stream, gradient in zip(inputs[:NUM_STREAMS], gradients[:NUM_STREAMS], strict=True)
    ]
    every = [*streams, *inputs[NUM_STREAMS:]]
    return [meta for meta, is_returned in zip(every, returned, strict=True) if is_returned]


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    # Never in place, because autograd may return the same tensor as several gradients.
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient


def _laid_out_as(meta: Tensor, gradient: Tensor | None) -> Tensor:
    """Return the gradient in the layout of `torch.empty_like(meta)`, which the graph expects; zeros for None."""
    if gradient is None:
        return torch.zeros_like(meta)
    promised = torch.empty_like(meta, device="meta")  # Only for its layout, which most gradients already have.
    if gradient.stride() == promised.stride() and gradient.dtype == promised.dtype:
        return gradient
    return torch.empty_like(meta).copy_(gradient)


@contextmanager
def _random_states_left_alone(devices: Sequence[torch.device]) -> Iterator[None]:
    # Each step sets the states of the forward pass; later draws of the caller must not depend on them.
    before = [get_random_state(device) for device in devices]
    try:
        yield
    finally:
        for device, state in zip(devices, before, strict=True):
            set_random_state(device, state)
