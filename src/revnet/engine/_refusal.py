"""Refusing what cannot be compiled, in a way that reaches the user.

An exception that traced code or a fake kernel raises is not sure to end the trace: without `fullgraph=True`, the tracer
may break the graph there and go on with what is left. An exception in a function that runs for its constant result does
end it.
"""

from revnet._torch_internals import constant_while_tracing


class CannotCompile(NotImplementedError):
    """A chain does what the operators cannot run."""


@constant_while_tracing
def refuse(message: str) -> None:
    """End the trace with an error."""
    raise CannotCompile(message)
