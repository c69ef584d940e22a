"""The reversible run for `torch.compile`: operators that a compiled graph takes whole, backward pass included.

Saved-tensor hooks cannot be traced. Under `torch.compile` a chain of half-blocks is therefore one operator, which runs
it and keeps nothing, and another in the backward pass, which rebuilds the streams and differentiates one residual
function at a time. The graph sees tensors only: the streams, the arguments, the parameters, the buffers, and in one
tensor of bytes what the backward pass has to find again (random states, and buffers as they were). The rest is a
*program*, which the graph names by a number: the functions, and what the trace fixed and guards (training flags,
autocast, arguments that are no tensors). Which functions draw random numbers or write to their buffers is found while
tracing, by running each once without computing.

References:
    Gomez et al. (2017), The Reversible Residual Network, Algorithm 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from revnet._types import TensorPair
from revnet.coupling import AbstractCoupling
from revnet.errors import ReconstructionError
from revnet.functional._half_block import HalfBlock, check_magnitude, hooks_are_not_compiled, residual_of
from revnet.functional._program import (
    PROGRAMS,
    TENSOR,
    Program,
    constant_buffers,
    handle_of,
    has_log_det,
    passes_gradients,
    probe,
    program_of,
)
from revnet.functional._recompute import get_random_state, same_random_state, set_random_state
from revnet.functional._storage import is_only_owner, storage_key, version_of


def compiled(
    half_blocks: Sequence[HalfBlock], streams: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TensorPair | None:
    """`reversible`, for `torch.compile` to trace; not to be called otherwise.

    Returns:
        The streams after the half-blocks; None, and nothing was done, if no gradient will be wanted of them.

    Raises:
        NotImplementedError: A function's parameters are sharded, functions share a buffer, or streams are not two.
    """
    if len(streams) != 2:
        raise NotImplementedError(
            f"{len(streams)} streams cannot be compiled as a whole; compile the residual functions instead: "
            "`for function in block.functions: function.compile()`."
        )
    x1, x2 = streams
    for half_block in half_blocks:
        if half_block.owner is not None:
            raise hooks_are_not_compiled(half_block)
    functions: list[nn.Module] = []
    handles: list[int] = []
    calls = []
    for half_block in half_blocks:
        handle = handle_of(half_block.function)
        if handle not in handles:
            handles.append(handle)
            functions.append(half_block.function)
        calls.append(
            (handles.index(handle), half_block.updates, half_block.name, half_block.coupling.number, half_block.reads)
        )
    leaves, spec = tree_flatten((args, kwargs))
    arguments = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    parameters: list[Tensor] = []
    buffers: list[Tensor] = []
    training: list[list[bool]] = []
    for function in functions:
        flags = []
        for module in function.modules():
            flags.append(module.training)
            parameters.extend([tensor for tensor in module._parameters.values() if tensor is not None])
            buffers.extend([tensor for tensor in module._buffers.values() if tensor is not None])
        training.append(flags)
    if not any(tensor.requires_grad for tensor in (x1, x2, *arguments, *parameters)):
        return None
    program = program_of(
        handles,
        calls,
        training,
        [
            (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
            for device_type in dict.fromkeys(("cpu", x1.device.type))
        ],
        tree_unflatten([TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec),
        half_blocks[0].log_dets is not None,
    )
    log_dets = half_blocks[0].log_dets
    torch.ops.revnet.probe(program, x1, x2, arguments, parameters, buffers)
    is_constant = constant_buffers(program)
    constants = [buffer for buffer, constant in zip(buffers, is_constant, strict=True) if constant]
    changing = [buffer for buffer, constant in zip(buffers, is_constant, strict=True) if not constant]
    counts = (len(arguments), len(parameters), len(constants))
    updated = [half_block.updates for half_block in half_blocks]
    y1, y2, log_det = _Reversible.apply(
        program, counts, updated, x1, x2, *arguments, *parameters, *constants, *changing
    )
    if log_dets is not None and has_log_det(program):
        log_dets[:] = [sum(log_dets, start=log_det)]
    return y1 if 0 in updated else x1, y2 if 1 in updated else x2


class _Reversible(torch.autograd.Function):
    """What is traced: an operator forward, and an operator backward."""

    @staticmethod
    def forward(
        ctx: Any, program: int, counts: tuple[int, int, int], updated: list[int], x1: Tensor, x2: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        first_constant = counts[0] + counts[1]
        first_changing = first_constant + counts[2]
        arguments, parameters = list(rest[: counts[0]]), list(rest[counts[0] : first_constant])
        constants, changing = list(rest[first_constant:first_changing]), list(rest[first_changing:])
        wanted = [tensor.requires_grad for tensor in (x1, x2, *arguments, *parameters)]
        y1, y2, log_det, state = torch.ops.revnet.forward(
            program, x1, x2, arguments, parameters, constants, changing, wanted
        )
        # A stream that nothing updates ends as it began; one that only the last function updates is never read again.
        end1, end2 = y1 if 0 in updated else x1, y2 if 1 in updated else x2
        if len(updated) == 1 and passes_gradients(program):
            end1, end2 = (y1.new_empty(0), end2) if updated[0] == 0 else (end1, y2.new_empty(0))
        ctx.save_for_backward(end1, end2, state, *arguments, *parameters, *constants)
        ctx.program, ctx.counts, ctx.wanted, ctx.num_changing = program, counts, wanted, len(changing)
        return y1, y2, log_det

    @staticmethod
    def backward(ctx: Any, grad_y1: Tensor, grad_y2: Tensor, grad_log_det: Tensor) -> Any:
        end1, end2, state, *rest = ctx.saved_tensors
        counts, wanted = ctx.counts, ctx.wanted
        first_constant = counts[0] + counts[1]
        arguments, parameters = list(rest[: counts[0]]), list(rest[counts[0] : first_constant])
        constants = list(rest[first_constant:])
        grads = torch.ops.revnet.backward(
            ctx.program, end1, end2, state, arguments, parameters, constants, grad_y1, grad_y2, grad_log_det, wanted
        )
        remaining = iter(grads)  # The operator returns the wanted ones only.
        results = [next(remaining) if is_wanted else None for is_wanted in wanted]
        return None, None, None, *results, *[None] * (counts[2] + ctx.num_changing)


# Operators ------------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("revnet", "DEF")
_LIBRARY.define(
    "probe(SymInt program, Tensor x1, Tensor x2, Tensor[] arguments, Tensor[] parameters, Tensor[] buffers) -> Tensor"
)
_LIBRARY.define(
    "forward(SymInt program, Tensor x1, Tensor x2, Tensor[] arguments, Tensor[] parameters, Tensor[] constants, "
    "Tensor(a!)[] changing, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(SymInt program, Tensor y1, Tensor y2, Tensor state, Tensor[] arguments, Tensor[] parameters, "
    "Tensor[] constants, Tensor grad_y1, Tensor grad_y2, Tensor grad_log_det, bool[] wanted) -> Tensor[]"
)


@torch.library.impl(_LIBRARY, "probe", "CompositeExplicitAutograd")
def _probe_nothing(program: int, x1: Tensor, *_: Any) -> Tensor:
    return x1.new_empty(0)  # The probe is done while tracing; the graph drops this call.


@torch.library.register_fake("revnet::probe", lib=_LIBRARY)
def _probe_fake(
    program: int, x1: Tensor, x2: Tensor, arguments: list[Tensor], parameters: list[Tensor], buffers: list[Tensor]
) -> Tensor:
    probe(PROGRAMS[program], x1, x2, arguments, parameters, buffers)
    return x1.new_empty(0)


@torch.library.impl(_LIBRARY, "forward", "CompositeExplicitAutograd")
def _forward(
    program: int,
    x1: Tensor,
    x2: Tensor,
    arguments: list[Tensor],
    parameters: list[Tensor],
    constants: list[Tensor],
    changing: list[Tensor],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = PROGRAMS[program]
    buffers = run.merge(constants, changing)
    leaves = _leaves(wanted[2:], arguments, parameters)
    args, kwargs = run.arguments(leaves[: len(arguments)])
    devices = _devices(x1, arguments, parameters)
    streams = [x1, x2]
    log_det = run.no_log_det(x1)
    kept: list[Tensor] = []
    assert run.draws is not None
    for call, draws in zip(run.calls, run.draws, strict=True):
        half_block = run.half_block(call)
        source = streams[1 - call.updates].detach().requires_grad_()
        random_before = [get_random_state(device) for device in devices]
        if draws:
            kept += random_before
        kept += [buffer.clone() for buffer in run.kept(call.function, buffers)]
        versions = [version_of(constant) for constant in constants]
        # With gradients, so that the same kernels run as in the recomputation; what they save is dropped at once.
        with (
            torch.enable_grad(),
            saved_tensors_hooks(lambda _: None, _nothing_saved),
            run.entered(call.function, leaves[len(arguments) :], buffers),
        ):
            residual = residual_of(half_block, source, args, kwargs)
            with torch.no_grad():
                run.write_back(call.function, buffers)
        _check_foreseen(half_block, draws, devices, random_before, constants, versions)
        with torch.no_grad():
            more = run.log_det(call, streams[call.updates], residual.detach())
            if more is not None:
                log_det = log_det + more
            streams[call.updates] = call.coupling.forward(streams[call.updates], residual.detach(), call.name)
            check_magnitude(half_block, streams[call.updates])
        del source, residual
    updated = {call.updates for call in run.calls}
    y1, y2 = (streams[which] if which in updated else x1.new_empty(0) for which in (0, 1))
    return y1, y2, log_det, _pack(kept, x1.device)


@torch.library.register_fake("revnet::forward", lib=_LIBRARY)
def _forward_fake(
    program: int,
    x1: Tensor,
    x2: Tensor,
    arguments: list[Tensor],
    parameters: list[Tensor],
    constants: list[Tensor],
    changing: list[Tensor],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = PROGRAMS[program]
    buffers = run.merge(constants, changing)
    streams = probe(run, x1, x2, arguments, parameters, buffers)
    updated = {call.updates for call in run.calls}
    y1, y2 = (streams[which] if which in updated else x1.new_empty(0) for which in (0, 1))
    assert run.draws is not None
    states = sum(get_random_state(device).numel() for device in _devices(x1, arguments, parameters))
    size = sum(states for draws in run.draws if draws)
    size += sum(b.numel() * b.element_size() for call in run.calls for b in run.kept(call.function, buffers))
    return y1, y2, run.no_log_det(x1), x1.new_empty(size, dtype=torch.uint8)


@torch.library.impl(_LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward(
    program: int,
    y1: Tensor,
    y2: Tensor,
    state: Tensor,
    arguments: list[Tensor],
    parameters: list[Tensor],
    constants: list[Tensor],
    grad_y1: Tensor,
    grad_y2: Tensor,
    grad_log_det: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    run = PROGRAMS[program]
    assert run.draws is not None
    leaves = _leaves(wanted[2:], arguments, parameters)
    num_arguments = len(arguments)
    args, kwargs = run.arguments(leaves[:num_arguments])
    devices = _devices(grad_y1, arguments, parameters)
    buffers = run.scratch_for(constants)
    states = _unpack(run, state, devices, buffers)

    updated = {call.updates for call in run.calls}
    streams = [_Stream(y1), _Stream(y2)]
    grads = [grad if which in updated else None for which, grad in enumerate((grad_y1, grad_y2))]
    leaf_grads: list[Tensor | None] = [None] * len(leaves)
    first = 0 if any(wanted[:2]) else _first_wanted(run, leaves, num_arguments)
    before = [get_random_state(device) for device in devices]
    try:
        for index in reversed(range(first, len(run.calls))):
            call = run.calls[index]
            half_block = run.half_block(call)
            random_states, kept = states[index]
            for device, random_state in zip(devices, random_states, strict=False):
                set_random_state(device, random_state)
            for buffer, value in zip(run.kept(call.function, buffers), kept, strict=True):
                buffer.copy_(value)
            source_is_wanted = index > 0 or wanted[1 - call.updates]
            source = streams[1 - call.updates].tensor.detach().requires_grad_(source_is_wanted)
            with torch.enable_grad(), run.entered(call.function, leaves[num_arguments:], buffers):
                residual = residual_of(half_block, source, args, kwargs)
            coupling = call.coupling
            if index > first or not coupling.is_additive:  # Below, nobody reads the stream.
                streams[call.updates].part(residual.detach(), coupling, call.name)
            grad_y = grads[call.updates]
            if grad_y is None:
                continue
            joined, x, log_det = residual, None, None
            if not coupling.is_additive:
                stream_is_wanted = index > 0 or wanted[call.updates]
                x = streams[call.updates].tensor.detach().requires_grad_(stream_is_wanted)
                with torch.enable_grad():
                    joined = coupling.forward(x, residual, call.name)
                    log_det = run.log_det(call, x, residual)
            if not joined.requires_grad:
                continue
            positions = _wanted_positions(run, call.function, leaves, num_arguments)
            inputs = [leaves[position] for position in positions] + [source] * source_is_wanted
            if x is not None and x.requires_grad:
                inputs.append(x)
            edges, grads_joined = [get_gradient_edge(joined)], [grad_y.to(joined.dtype)]
            if log_det is not None and log_det.requires_grad:
                edges.append(get_gradient_edge(log_det))
                grads_joined.append(grad_log_det)
            del source, residual, joined, log_det, grad_y  # Their memory is free for the gradients.
            _check_leaves(edges[0], call.name, inputs)
            found = torch.autograd.grad(edges, inputs, grads_joined, allow_unused=True)
            del edges, inputs, grads_joined
            if x is not None:
                grads[call.updates], found = (found[-1], found[:-1]) if x.requires_grad else (None, found)
                del x
            if source_is_wanted:
                grads[1 - call.updates] = _sum(grads[1 - call.updates], found[-1])
            for position, gradient in zip(positions, found, strict=False):
                leaf_grads[position] = _sum(leaf_grads[position], gradient)
            del found
    finally:
        for device, random_state in zip(devices, before, strict=True):
            set_random_state(device, random_state)
    metas = _gradient_metas(run, y1, y2, grad_y1, grad_y2, arguments, parameters)
    results = []
    seen = {storage_key(grad_y1), storage_key(grad_y2)}  # An operator returns nothing twice, and none of its inputs.
    for meta, found_gradient, is_wanted in zip(metas, [*grads, *leaf_grads], wanted, strict=True):
        if is_wanted:
            result = _laid_out_as(meta, found_gradient)
            results.append(result.clone() if storage_key(result) in seen else result)
            seen.add(storage_key(result))
    return results


@torch.library.register_fake("revnet::backward", lib=_LIBRARY)
def _backward_fake(
    program: int,
    y1: Tensor,
    y2: Tensor,
    state: Tensor,
    arguments: list[Tensor],
    parameters: list[Tensor],
    constants: list[Tensor],
    grad_y1: Tensor,
    grad_y2: Tensor,
    grad_log_det: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    metas = _gradient_metas(PROGRAMS[program], y1, y2, grad_y1, grad_y2, arguments, parameters)
    return [torch.empty_like(meta) for meta, is_wanted in zip(metas, wanted, strict=True) if is_wanted]


class _Stream:
    """A stream on its way back. What it begins as belongs to the graph; what it becomes may be written over."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._is_own = False

    def part(self, residual: Tensor, coupling: AbstractCoupling, name: str) -> None:
        in_place = self._is_own and is_only_owner(self.tensor)
        self.tensor = coupling.inverse(self.tensor, residual, name, in_place=in_place)
        self._is_own = True


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    # Never in place: autograd may give the same tensor as several gradients.
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient


def _leaves(wanted: Sequence[bool], arguments: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The arguments and parameters as leaves of their own, so that nothing hangs on the caller's graph."""
    leaves: list[Tensor] = []
    for position, (tensor, is_wanted) in enumerate(zip((*arguments, *parameters), wanted, strict=True)):
        is_argument = position < len(arguments)
        leaves.append(
            tensor.detach().requires_grad_(is_wanted)
            if is_argument
            else nn.Parameter(tensor.detach(), requires_grad=is_wanted)
        )
    return leaves


def _wanted_positions(run: Program, which: int, leaves: Sequence[Tensor], num_arguments: int) -> list[int]:
    """Where among `leaves` a call of one function finds what needs a gradient."""
    of_function = run.of_function(which, range(len(leaves) - num_arguments), "parameters")
    positions = [*range(num_arguments), *(num_arguments + position for position in of_function)]
    return [position for position in positions if leaves[position].requires_grad]


def _first_wanted(run: Program, leaves: Sequence[Tensor], num_arguments: int) -> int:
    """The first call that a backward pass must reach, where the input needs no gradient."""
    for index, call in enumerate(run.calls):
        if _wanted_positions(run, call.function, leaves, num_arguments):
            return index
    return len(run.calls)


def _check_leaves(edge: GradientEdge, name: str, expected: Sequence[Tensor]) -> None:
    """Raise if the residual depends on a tensor that the graph does not know, whose gradient would be lost."""
    known = {id(tensor) for tensor in expected}
    nodes, seen = [edge.node], {edge.node}
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ReconstructionError(
                f"`{name}` uses a tensor of shape {tuple(leaf.shape)} that requires a gradient but is neither its "
                "parameter nor its argument, and torch.compile cannot see it; make it an `nn.Parameter` of the "
                "function, pass it as an argument, or keep its block's activations with the policy `Store()`."
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def _check_foreseen(
    half_block: HalfBlock,
    draws: bool,
    devices: Sequence[torch.device],
    random_before: Sequence[Tensor],
    constants: Sequence[Tensor],
    versions: Sequence[int],
) -> None:
    """Raise if a function did what the probe did not see: its recomputation would differ."""
    drew = not all(
        same_random_state(state, get_random_state(device)) for device, state in zip(devices, random_before, strict=True)
    )
    wrote = any(version_of(constant) != version for constant, version in zip(constants, versions, strict=True))
    if (drew and not draws) or wrote:
        what = "drew random numbers" if drew and not draws else "wrote to a buffer"
        raise ReconstructionError(
            f"`{half_block.name}` {what}, but did not when it was traced; a function that does so only sometimes "
            "cannot be part of a compiled reversible sequence: keep its block's activations with the policy `Store()`."
        )


def _devices(x1: Tensor, arguments: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[torch.device]:
    """Every device whose random state matters, in a fixed order."""
    devices = {torch.device("cpu"), *(tensor.device for tensor in (x1, *arguments, *parameters))}
    return sorted((device for device in devices if device.type != "meta"), key=str)


def _pack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The tensors' bytes, one after the other."""
    pieces = [tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device) for tensor in tensors]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)


def _unpack(
    run: Program, state: Tensor, devices: Sequence[torch.device], buffers: Sequence[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each call, the random states and the buffers that `_pack` joined."""
    position = 0

    def take(like: Tensor) -> Tensor:
        nonlocal position
        size = like.numel() * like.element_size()
        piece = state[position : position + size].clone()  # A copy, for its alignment.
        position += size
        return piece.view(like.dtype).view(like.shape).to(like.device)

    assert run.draws is not None
    now = [get_random_state(device) for device in devices]
    return [
        ([take(each) for each in now] if draws else [], [take(buffer) for buffer in run.kept(call.function, buffers)])
        for call, draws in zip(run.calls, run.draws, strict=True)
    ]


def _gradient_metas(
    run: Program,
    y1: Tensor,
    y2: Tensor,
    grad_y1: Tensor,
    grad_y2: Tensor,
    arguments: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """A tensor like the gradient of each input: both streams, the arguments, the parameters."""
    updated = {call.updates for call in run.calls}
    streams = [grad if which in updated else y for which, y, grad in ((0, y1, grad_y1), (1, y2, grad_y2))]
    return [*streams, *arguments, *parameters]


def _laid_out_as(meta: Tensor, gradient: Tensor | None) -> Tensor:
    """The gradient as `torch.empty_like(meta)` lies, which is what the graph was promised; zeros for none."""
    if gradient is None:
        return torch.zeros_like(meta)
    promised = torch.empty_like(meta, device="meta")  # Its layout alone: most gradients lie so already.
    if gradient.stride() == promised.stride() and gradient.dtype == promised.dtype:
        return gradient
    return torch.empty_like(meta).copy_(gradient)


def _nothing_saved(_: None) -> Tensor:
    raise ReconstructionError(
        "a residual function of a compiled reversible sequence differentiates inside itself, which works uncompiled "
        "only; compile the residual functions instead: `block.f.compile(); block.g.compile()`."
    )
