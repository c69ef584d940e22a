"""Keeping what functions read, and computing again what is inside them.

Where the engine of `_reversible` rebuilds the input of a function, this keeps it: the same slots in the graph, the same
conditions around the second run, no walk and no rounding. What a function computes after the last tensor that autograd
saved is not computed again; for two convolutions or two linear layers that is the second one.

References:
    Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revnet._types import Streams
from revnet.engine.compile import runs_plainly
from revnet.functional._call import Call
from revnet.functional._half_block import HalfBlock, run_chain
from revnet.functional._recompute import Conditions, tensors_in
from revnet.functional._reversible import run_reversible, stored
from revnet.functional._storage import version_of


def checkpointed(
    half_blocks: Sequence[HalfBlock], streams: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Streams:
    """Run half-blocks and keep the stream that each one reads; the backward pass computes the rest again.

    Arguments, results and errors are those of `reversible`.

    Numerics:
        Output and gradients are those of `stored`, bit for bit, where the functions are deterministic.
    """
    if runs_plainly():
        return stored(half_blocks, streams, args, kwargs)

    def advance(half_block: HalfBlock, streams: list[Tensor]) -> None:
        # A chain of one: of its final streams, the run holds the one that the function reads, since nothing else is
        # ever read again. Where gradients depend on the stream that it updates, that one too, as it was.
        alone = [half_block._replace(owner=None)]
        keeps_input = not half_block.coupling.is_additive
        streams[:] = run_reversible(alone, tuple(streams), args, kwargs, keeps_input=keeps_input)[0]

    running = list(streams)
    del streams
    run_chain(half_blocks, running, args, kwargs, advance)
    return tuple(running)


def checkpointed_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module and keep its arguments; the backward pass computes its activations again.

    As `torch.utils.checkpoint` does, but buffers such as batch-norm statistics count once.

    Raises:
        RuntimeError: The module modified an argument in place.
        ReconstructionError: In the backward pass, the activations cannot be computed again.
        NotImplementedError: Under `torch.compile`.
    """
    if runs_plainly():
        return module(*args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(
            f"a {type(module).__name__} whose activations are computed again cannot be compiled whole; give it the "
            "policy `Store()` before compiling, or compile the residual functions instead."
        )
    return _KeptCall(module, args, kwargs).run() if torch.is_grad_enabled() else module(*args, **kwargs)


class _KeptCall:
    """One call of a module, able to be repeated since its arguments are kept."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._module = module
        self._args = args
        self._kwargs = kwargs
        self._tensors = tensors_in(args, kwargs)
        self._call = Call(type(module).__name__, Conditions(module, None, self._tensors))
        self.is_finished = False
        self.lock = threading.RLock()

    def run(self) -> Any:
        """Compute for the first time."""
        versions = [version_of(tensor) for tensor in self._tensors]
        result = self._call.first(self, 0, lambda: self._module(*self._args, **self._kwargs))
        if versions != [version_of(tensor) for tensor in self._tensors]:
            raise RuntimeError(
                f"{type(self._module).__name__} modified an argument in place, so that its activations cannot be "
                "computed again; use the out-of-place form of its first operation (`inplace=False`), or the policy "
                "`Store()`."
            )
        self.is_finished = True
        return result

    def rebuild(self, index: int) -> None:
        """Compute again."""
        self._call.repeat(
            lambda: self._module(*self._args, **self._kwargs), fill=True, is_rounded=False, needs_result=False
        )
