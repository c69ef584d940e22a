"""What eager code owes to whoever traces it: to run plainly, or to refuse in a way that reaches the user.

An exception that traced code or a fake kernel raises is not sure to end the trace: without `fullgraph=True`, the tracer
may break the graph there and go on with what is left. An exception in a function that runs for its constant result does
end it.
"""

import torch

from revnet._torch_internals import constant_while_tracing


class CannotCompileError(NotImplementedError):
    """A chain does what the operators cannot run."""


@constant_while_tracing
def refuse(message: str) -> None:
    """End the trace with an error."""
    raise CannotCompileError(message)


def runs_plainly() -> bool:
    """Return whether a chain must run by ordinary autograd, since what runs it will be written to a file.

    So it is under `torch.export` and `torch.jit.trace`, and what is built on them, such as ONNX exporters. What they
    write must consist of PyTorch's own operators, and there is no backward pass to save memory for.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
