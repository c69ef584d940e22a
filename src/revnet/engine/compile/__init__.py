"""Run a chain inside a graph of `torch.compile`, which takes it as operators, backward pass included.

Saved-tensor hooks, on which the engine is built, cannot be traced. Under `torch.compile`, a chain of half-blocks is
therefore one operator, and its gradient is another:

    forward     runs the chain and keeps the final streams, as the engine does                      `_forward`
    backward    rebuilds the streams, and differentiates one residual function at a time            `_backward`

The operators run the functions unchanged, in Python. The compiler sees only the inputs and outputs of the operators,
and fuses nothing inside a function. It must know everything that the operators read and write:

- The *inputs* are tensors that may need a gradient: both streams, the tensors among the arguments, and the parameters.
- The *buffers* are inputs too. Buffers that change are also outputs, and the graph copies them into place.
- The state that the backward pass needs travels in one tensor of bytes: random states, and the buffers as each step
  read them (`_kept`).
- Everything else is a *program*, to which the graph refers by a number (`_program`): the functions, and the values that
  the trace fixes and guards (training flags, switches, autocast, couplings, arguments that are not tensors).
  `torch.compile` creates a new program if any of them changes. A program is deleted together with its functions.

While tracing, a run on fake tensors (`_probe`) shows what each function does: whether it draws random numbers, which
buffers it writes to, and on which tensors its result depends. A parameter on which nothing depends gets no gradient,
as in plain autograd. A function that later does something that the probe did not see raises, unless a switch tells that
it will (`_switches`). So does a function with side effects, such as appending an auxiliary loss to a list, where the
loss would lose its gradient (`_side_effects`).

References:
    Gomez et al. (2017), The Reversible Residual Network, Algorithm 1.
"""

from collections.abc import Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from revnet._torch_internals import tree_flatten, tree_leaves, tree_unflatten
from revnet._types import Streams
from revnet.engine._chain import BoundChain
from revnet.engine._tracing import refuse, refuse_sharded
from revnet.engine._tracing import runs_plainly as runs_plainly
from revnet.engine.compile import _operators as _operators  # Defines the operators.
from revnet.engine.compile._program import (
    NUM_STREAMS,
    TENSOR,
    changing_buffers,
    digest_of,
    has_log_det,
    number_of,
    program_of,
)
from revnet.engine.compile._switches import read_switches

# The values that the trace can fix, apart from tensors. Other objects may hold tensors, which the graph would not see.
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), Enum, slice, range, type, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


def compiled(chain: BoundChain, streams: Sequence[Tensor]) -> Streams | None:
    """Run a chain as `reversible` does, for `torch.compile` to trace. Call it only while tracing.

    Returns:
        The streams after the half-blocks. Or None, without having run anything, if no gradient is needed.

    Raises:
        CannotCompileError: There are more than two streams, a block has hooks, there is a tolerance, a coupling draws
            random numbers or keeps bits, an argument is an object, functions have sharded parameters or share a buffer,
            or a function has side effects.
    """
    _check(chain, streams)
    # Plain loops from here on, because the compiler traces this function line by line.
    functions, numbers, steps = _steps(chain)
    leaves, spec = tree_flatten((chain.args, chain.kwargs, chain.own_kwargs))
    inputs = [*streams, *[leaf for leaf in leaves if isinstance(leaf, Tensor)]]
    buffers: list[Tensor] = []
    training: list[list[bool]] = []
    for function in functions:
        flags = []
        # In the order of `places`, which the program uses to find them again.
        for module in function.modules():
            flags.append(module.training)
            inputs.extend([tensor for tensor in module._parameters.values() if tensor is not None])
            buffers.extend([tensor for tensor in module._buffers.values() if tensor is not None])
        training.append(flags)
        read_switches(function)
    wanted = [tensor.requires_grad for tensor in inputs]
    if not any(wanted):
        return None
    _check_operands(chain)
    program = program_of(
        numbers,
        steps,
        training,
        [
            (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
            for device_type in dict.fromkeys(("cpu", streams[0].device.type))
        ],
        tree_unflatten(list(range(len(leaves))), spec),
        # As a slice, in which the trace turns a symbolic number into a constant, with a guard.
        [TENSOR if isinstance(leaf, Tensor) else slice(leaf) for leaf in leaves],
        chain.input_dtype,
        chain.log_dets is not None,
    )
    # First, because everything below depends on the findings. The result is not used, so the graph drops it.
    torch.ops.revnet.probe(program, inputs, buffers, wanted)
    y1, y2, log_det, _, changed = torch.ops.revnet.forward(program, digest_of(program), inputs, buffers, wanted)
    # In the graph rather than in the operator: an operator with a gradient must not write to its inputs.
    with torch.no_grad():
        for position, value in zip(changing_buffers(program), changed, strict=True):
            buffers[position].copy_(value)
    if chain.log_dets is not None and has_log_det(program):
        chain.log_dets[:] = [sum(chain.log_dets, start=log_det)]
    targets = [half_block.target for half_block in chain.half_blocks]
    # An operator must not return its inputs, so a stream that no step updates does not pass through it.
    return y1 if 0 in targets else streams[0], y2 if 1 in targets else streams[1]


def _check(chain: BoundChain, streams: Sequence[Tensor]) -> None:
    """Raise for chains that the operators cannot run."""
    if len(streams) != NUM_STREAMS:
        refuse(
            f"{len(streams)} streams cannot be compiled as a whole; compile the residual functions instead: "
            "`for function in block.functions: function.compile()`."
        )
    for half_block in chain.half_blocks:
        if half_block.coupling.remembers:
            refuse(
                "a coupling that keeps bits of its streams, `BDIA` or `ExactScaled` with a small factor, cannot be "
                "compiled as a whole; compile the residual functions instead: `block.f.compile(); block.g.compile()`, "
                "or store activations with `set_policy(model, 'store')`."
            )
    if chain.tolerance is not None:
        refuse(
            "a ReversibleSequential with a `tolerance` cannot be compiled as a whole; reverse exactly with "
            "`set_coupling(model, FixedPoint())`, or compile the residual functions: `block.f.compile()`."
        )
    if chain.chain.blocks is not None:
        for half_block, block in zip(chain.half_blocks, chain.chain.blocks, strict=True):
            if block is not None:
                refuse_sharded(block)
                refuse(
                    f"the block of `{half_block.name}` has hooks or a `forward` of its own, which a compiled "
                    "reversible sequence does not call; register hooks on its `f` and `g`, or on the sequence."
                )


def _check_operands(chain: BoundChain) -> None:
    """Raise for a coupling that is drawn for each call, and for an argument that is neither a tensor nor a constant."""
    for half_block in chain.half_blocks:
        if half_block.coupling.draws:
            refuse(
                f"the coupling of `{half_block.name}` draws random numbers or depends on the mode (`draws` is True), "
                "which a compiled reversible sequence cannot repeat; compile the residual functions instead: "
                "`block.f.compile(); block.g.compile()`, or store activations with `set_policy(model, 'store')`."
            )
    named: list[tuple[str, Any]] = [(f"argument {index} after the input", arg) for index, arg in enumerate(chain.args)]
    for kwargs in (chain.kwargs, *chain.own_kwargs.values()):
        named.extend([(f"argument `{name}`", value) for name, value in kwargs.items()])
    for name, value in named:
        for leaf in tree_leaves(value):
            if not isinstance(leaf, (Tensor, *_CONSTANTS)):
                refuse(
                    f"{name} is an object of {type(leaf).__name__}, in which a compiled reversible sequence cannot see "
                    "tensors or changes; pass its tensors and numbers, or compile the residual functions instead: "
                    "`block.f.compile(); block.g.compile()`."
                )


def _steps(chain: BoundChain) -> tuple[list[nn.Module], list[int], list[tuple[int, int, int, str, int, str, bool]]]:
    """Return the distinct functions of a chain, their numbers, and the steps of its program."""
    functions: list[nn.Module] = []
    numbers: list[int] = []
    steps = []
    for function, target, source, name, coupling, role, takes_arguments in chain.half_blocks:
        number = number_of(function)  # The parameters of a function that occurs twice are passed once.
        if number not in numbers:
            numbers.append(number)
            functions.append(function)
        steps.append((numbers.index(number), target, source, name, number_of(coupling), role, takes_arguments))
    return functions, numbers, steps
