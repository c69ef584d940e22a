"""The operators of a compiled graph, one for the forward pass and one for the backward pass.

The compiler treats them like a convolution: it knows the shapes of their results, and which operator computes the
gradients of the other.
"""

from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import autograd_in_operators
from revnet.engine.compile._backward import BackwardPass, gradient_metas
from revnet.engine.compile._flow import reached
from revnet.engine.compile._forward import ForwardPass, Results
from revnet.engine.compile._kept import devices_of, num_bytes
from revnet.engine.compile._probe import probe
from revnet.engine.compile._program import NUM_STREAMS, PROGRAMS

_LIBRARY = torch.library.Library("revnet", "DEF")
# The inputs are both streams, the arguments and the parameters, and `wanted` flags the ones that require a gradient.
# The results are both streams, the log-determinant, the kept bytes, and the buffers that changed. The digest only
# serves caches of compiled graphs, which outlive programs: the numbers of programs are valid in one process only.
_LIBRARY.define("probe(SymInt program, Tensor[] inputs, Tensor[] buffers, bool[] wanted) -> Tensor")
_LIBRARY.define(
    "forward(SymInt program, str digest, Tensor[] inputs, Tensor[] buffers, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])"
)
# Here, the inputs are the streams after the last step, the arguments and the parameters.
_LIBRARY.define(
    "backward(SymInt program, Tensor[] inputs, Tensor[] constants, Tensor state, Tensor?[] gradients, bool[] wanted) "
    "-> Tensor[]"
)


@torch.library.impl(_LIBRARY, "probe", "CompositeExplicitAutograd")
def _probe(program: int, inputs: list[Tensor], *_: Any) -> Tensor:
    return inputs[0].new_empty(0)  # Only the trace needs the probe; the graph drops it, since no result depends on it.


@torch.library.register_fake("revnet::probe", lib=_LIBRARY)
def _probe_fake(program: int, inputs: list[Tensor], *operands: Any) -> Tensor:
    try:
        probe(PROGRAMS[program], inputs, *operands)
    except (NotImplementedError, TypeError) as refusal:  # `CannotCompileError`, or an error of a function.
        # The trace may break the graph at such an error, and then report the missing findings instead.
        PROGRAMS[program].refusal = refusal  # `digest_of`, which the trace calls next, raises it.
    return inputs[0].new_empty(0)


@torch.library.impl(_LIBRARY, "forward", "CompositeExplicitAutograd")
def _forward(program: int, digest: str, *operands: Any) -> Results:
    return ForwardPass(PROGRAMS[program], *operands).run()


@torch.library.register_fake("revnet::forward", lib=_LIBRARY)
def _forward_fake(
    program: int, digest: str, inputs: list[Tensor], buffers: list[Tensor], wanted: list[bool]
) -> Results:
    run = PROGRAMS[program]
    x1 = inputs[0]
    streams = probe(run, inputs, buffers, wanted)
    y1, y2 = (streams[number] if number in run.targets else x1.new_empty(0) for number in range(NUM_STREAMS))
    size = num_bytes(run, devices_of(x1, inputs[NUM_STREAMS:]), buffers)
    changed = [
        torch.empty_like(b) for b, constant in zip(buffers, run.known_findings.is_constant, strict=True) if not constant
    ]
    return y1, y2, run.no_log_det(x1), x1.new_empty(size, dtype=torch.uint8), changed


@torch.library.impl(_LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward(program: int, *operands: Any) -> list[Tensor]:
    # Functions may record graphs anywhere in the pass, such as in checkpoints of their own.
    with autograd_in_operators(), torch.no_grad():
        return BackwardPass(PROGRAMS[program], *operands).run()


@torch.library.register_fake("revnet::backward", lib=_LIBRARY)
def _backward_fake(
    program: int,
    inputs: list[Tensor],
    constants: list[Tensor],
    state: Tensor,
    gradients: list[Tensor | None],
    wanted: list[bool],
) -> list[Tensor]:
    returned = reached(PROGRAMS[program], wanted, [gradient is not None for gradient in gradients])
    return [torch.empty_like(meta) for meta in gradient_metas(inputs, gradients, returned)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """Save the inputs of the backward operator: final streams, arguments, and what the forward operator kept."""
    program, _, tensors, buffers, wanted = inputs
    y1, y2, _, state, changed = output
    run = PROGRAMS[program]
    # A stream that no step updates ends as it began.
    ends = [y if number in run.targets else x for number, (x, y) in enumerate(zip(tensors[:2], (y1, y2), strict=True))]
    if len(run.steps) == 1 and run.steps[0].coupling.is_additive:
        ends[run.steps[0].target] = y1.new_empty(0)  # With a single step, the updated stream is never read again.
    constants = [b for b, constant in zip(buffers, run.known_findings.is_constant, strict=True) if constant]
    ctx.save_for_backward(*ends, *tensors[NUM_STREAMS:], *constants, state)
    ctx.mark_non_differentiable(state, *changed)
    # A parameter that the loss does not depend on must get None, not zeros, to which a weight decay would apply.
    ctx.set_materialize_grads(False)
    ctx.program, ctx.wanted, ctx.num_inputs, ctx.num_buffers = program, wanted, len(tensors), len(buffers)


def _gradients(ctx: Any, grad_y1: Any, grad_y2: Any, grad_log_det: Any, *_: Any) -> Any:
    *saved, state = ctx.saved_tensors
    incoming = [grad_y1, grad_y2, grad_log_det]
    returned = reached(PROGRAMS[ctx.program], ctx.wanted, [gradient is not None for gradient in incoming])
    remaining = iter(
        torch.ops.revnet.backward(
            ctx.program, saved[: ctx.num_inputs], saved[ctx.num_inputs :], state, incoming, ctx.wanted
        )
    )
    gradients = [next(remaining) if is_returned else None for is_returned in returned]
    return None, None, gradients, [None] * ctx.num_buffers, None


torch.library.register_autograd("revnet::forward", _gradients, setup_context=_save_for_backward, lib=_LIBRARY)


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _refuse_second_derivatives(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "a compiled reversible sequence was differentiated twice (`create_graph=True`), which no graph of "
        "torch.compile supports; compute second derivatives without compiling the model."
    )


# Backends without a backward graph of their own, such as "eager", run the operator under autograd. Without a formula,
# its results would have no graph, and second derivatives would silently lack a part.
torch.library.register_autograd(
    "revnet::backward", _refuse_second_derivatives, setup_context=_save_nothing, lib=_LIBRARY
)
