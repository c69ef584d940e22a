"""The flow of gradients through a program: which gradients a backward pass computes, and how far it walks.

The graph relies on what the probe found. It expects gradients for certain inputs only, and the backward pass ends at
the first step that contributes to one of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from revnet.engine.compile._program import NUM_STREAMS, Program
from revnet.errors import ReconstructionError


def reached(program: Program, wanted: Sequence[bool], has_gradient: Sequence[bool]) -> list[bool]:
    """Return, for each input, whether a backward pass computes a gradient for it.

    Args:
        program: The program.
        wanted: For each input, whether it requires a gradient.
        has_gradient: For both streams and the log-determinant, whether they have a gradient.
    """
    is_live = list(has_gradient[:NUM_STREAMS])
    inputs: set[int] = set()
    for step, reach in zip(reversed(program.steps), reversed(program.known_findings.reaches), strict=True):
        # A log-determinant depends on the stream that its coupling updates.
        if has_gradient[NUM_STREAMS] and not step.coupling.is_additive:
            is_live[step.target] = True
        if is_live[step.target]:
            inputs.update(reach.inputs)
            is_live[step.source] |= reach.source
    inputs |= {number for number in range(NUM_STREAMS) if is_live[number]}
    return [is_wanted and position in inputs for position, is_wanted in enumerate(wanted)]


def first_step(program: Program, returned: Sequence[bool]) -> int:
    """Return the first step that a backward pass must reach, if it computes these gradients."""
    if any(returned[:NUM_STREAMS]):
        return 0
    wanted = {position for position, is_wanted in enumerate(returned) if is_wanted}
    reaches = program.known_findings.reaches
    return next((index for index, reach in enumerate(reaches) if wanted.intersection(reach.inputs)), len(reaches))


def leaves_of_result(result: Tensor) -> dict[int, Tensor]:
    """Return the leaves on which a tensor depends, by their ids."""
    if result.grad_fn is None:  # A function may return its input, which is a leaf itself.
        return {id(result): result} if result.requires_grad else {}
    return leaves_of(result.grad_fn)


def leaves_of(node: Any) -> dict[int, Tensor]:
    """Return the leaves that receive gradients from a graph, by their ids; `node` is the end of the graph."""
    variables = [getattr(node, "variable", None) for node in _nodes_of(node)]
    return {id(leaf): leaf for leaf in variables if leaf is not None}


def has_compiled_part(result: Tensor) -> bool:
    """Return whether a compiled function computed a part of a tensor.

    Its node in the graph leads to everything that the function read, even if it received no gradient.
    """
    return any(type(node).__name__ == "CompiledFunctionBackward" for node in _nodes_of(result.grad_fn))


def _nodes_of(node: Any) -> Iterator[Any]:
    # No recursion, because a graph may be deeper than Python's stack.
    remaining, seen = [node], {node}
    while remaining:
        node = remaining.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                remaining.append(following)


def lost_gradient(name: str, leaf: Tensor, source: Tensor, leaves: Sequence[Tensor]) -> ReconstructionError:
    """Return the error for a function that depends on a tensor whose gradient would be lost.

    Args:
        name: The name of the function.
        leaf: The tensor.
        source: The stream that the function read.
        leaves: The arguments and parameters of the function.
    """
    if leaf is source or any(leaf is known for known in leaves):
        what = "its input" if leaf is source else f"a parameter or an argument of shape {tuple(leaf.shape)}"
        return ReconstructionError(
            f"`{name}` depends on {what}, but did not when it was traced, so the gradient would be lost; call "
            "`torch.compiler.reset()` after such a change, or store its block's activations with the policy `Store()`."
        )
    return ReconstructionError(
        f"`{name}` uses a tensor of shape {tuple(leaf.shape)} that requires a gradient but is neither its parameter "
        "nor its argument, and torch.compile cannot see it; make it an `nn.Parameter` of the function, pass it as an "
        "argument, or store its block's activations with the policy `Store()`."
    )
