"""Every use of PyTorch that its documentation does not cover, in one file.

Each entry says why no public call will do, and what to do when it disappears. An upgrade of PyTorch begins here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

# The base class of dispatch modes, and the flattening of nested arguments that `torch.compile` can trace. Both are
# documented in PyTorch's developer notes only. If they move, follow them: nothing else sees each operator of a call,
# and `torch.compile` recognizes no other flattening.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten

Function = TypeVar("Function", bound=Callable[..., object])

# What a fake tensor raises when a program depends on values. If they disappear, catch what replaces them: see
# `torch._subclasses.fake_tensor.UnsupportedFakeTensorException` and its neighbors.
DEPENDS_ON_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def constant_while_tracing(function: Function) -> Function:
    """Run a function while `torch.compile` traces its caller, and take the result for a constant.

    Arguments that are objects (modules, couplings) are guarded by identity: exchanging one recompiles.

    Reason: `torch.compiler.assume_constant_result` does the same, but loads the whole compiler when this module is
    imported. When the attribute disappears: call the public function, and measure `import revnet`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def real_tensors_allowed(fake: Tensor) -> Iterator[None]:
    """Let operators mix `fake` with real tensors, which then count as fake ones.

    Reason: a residual function may use tensors that the trace does not know, such as a constant in an attribute.
    There is no public way to reach the mode of a fake tensor. When it disappears: such functions cannot be traced, and
    their error must say so.
    """
    mode = detect_fake_mode(fake)
    assert mode is not None
    allowed = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = allowed


def autograd_in_operators() -> AbstractContextManager[None]:
    """Record a graph in spite of running inside an operator, where autograd is switched off.

    Reason: only autograd knows which parameters a result depends on; `torch.enable_grad` does not suffice, since the
    dispatcher skips autograd altogether below an operator that has a backward formula. When it disappears: run the same
    code in a new thread, whose dispatcher starts without the exclusion.
    """
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    return guard
