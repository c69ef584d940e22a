"""Behavior of eager code while it is traced: it runs plainly, or refuses in a way that reaches the user.

An exception in traced code or in a fake kernel does not always end the trace: without `fullgraph=True`, the tracer may
break the graph there and continue. An exception in a function that runs for its constant result does end it.
"""

import torch
from torch import Tensor, nn

from revnet._checks import describe_kind
from revnet._torch_release import constant_of_object, constant_while_tracing, is_exporting
from revnet.engine._tensors import is_sharded


class CannotCompileError(NotImplementedError):
    """Raised for a chain that the operators cannot run."""


@constant_while_tracing
def refuse(message: str) -> None:
    """End the trace with an error."""
    raise CannotCompileError(message)


@constant_of_object
def refuse_sharded(module: nn.Module) -> None:
    """End the trace with an error if FSDP manages a parameter of `module`; the graph would not see its whole form."""
    if any(map(is_sharded, module.parameters())):
        raise CannotCompileError(
            "a reversible sequence with sharded parameters (FSDP) cannot be compiled as a whole; call "
            "`block.compile()` on each of its blocks before sharding instead."
        )


def refuse_other_results(name: str, residual: object) -> None:
    """End the trace with an error if a residual function did not return one tensor."""
    if not isinstance(residual, Tensor):
        raise CannotCompileError(
            f"`{name}` returned {describe_kind(residual)}, but a compiled reversible sequence needs one tensor; "
            "compile the residual functions instead: `block.f.compile(); block.g.compile()`."
        )


def runs_plainly() -> bool:
    """Return whether a chain must run with ordinary autograd, because it is being exported to a file.

    This is the case under `torch.export` and `torch.jit.trace`, and for exporters based on them, such as ONNX. The
    exported program must consist of PyTorch's own operators, and it has no backward pass to save memory for.
    """
    return is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
