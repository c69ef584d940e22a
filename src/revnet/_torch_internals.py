"""Every use of PyTorch that its documentation does not cover, with the reason, and what to do when it disappears.

An upgrade of PyTorch begins here: when a release removes one of these, this file is the one to change.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import methodcaller
from types import CodeType
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

# Fake tensors, which have shapes and no values, the mode that makes them, the mode that is on, and what they raise if a
# value is needed. Documented in PyTorch's developer notes only. If they move, follow them: predictions run on them.
from torch._guards import active_fake_mode as active_fake_mode
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException as UnsupportedFakeTensorException
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException

# The base class of dispatch modes, and the flattening of nested arguments that `torch.compile` can trace. Both are
# documented in PyTorch's developer notes only. If they move, follow them: nothing else sees each operator of a call,
# and `torch.compile` recognizes no other flattening.
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten

# The public `torch.autograd.graph.saved_tensors_hooks` is a context manager that calls these two; entered and left for
# every residual function, it costs three times as much. Replacement: the context manager.
push_saved_tensors_hooks = torch._C._autograd._push_saved_tensors_default_hooks
pop_saved_tensors_hooks = torch._C._autograd._pop_saved_tensors_default_hooks

# `torch.enable_grad` and `torch.no_grad` as contexts call this. Replacement: `torch.set_grad_enabled`, which is slower.
set_grad_enabled = torch._C._set_grad_enabled

# The number that the next node of the autograd graph gets on this thread: a tensor whose node has a lower number was
# computed earlier. There is no public way to ask. Replacement: run a cheap operation and read its node's number.
next_sequence_number = torch._C._autograd._get_sequence_nr

# Whether a transform of `torch.func` wraps tensors just now, so that they have no values. Replacement: catch the error
# that reading a value raises.
in_functorch_transform = torch._C._are_functorch_transforms_active

# Called while `torch.func.grad` and others forbid saved-tensor hooks. Replacement: match the error's text.
hooks_are_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message

# Whether a profiler is on; asked before each replay, so that the name of the range is only built when it is seen.
# Replacement: enter `record_function` always.
profiler_is_on: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


# Whether autocast is on for any type of device; asked before each replay. Replacement: `torch.is_autocast_enabled` of
# each type of device that the run uses.
any_autocast_is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled


# Whether a hook is registered on all modules, which a block that is not called would miss. Public registration, private
# question. Replacement: call every block (slower).
has_global_module_hook = _has_any_global_hook

# Whether PyTorch was built for a device besides the CPU. `torch.accelerator` is public since 2.6.
HAS_ACCELERATOR = torch.accelerator.current_accelerator() is not None


# The place of a node in the order in which nodes were created on its thread. Replacement: as `next_sequence_number`.
sequence_number_of: Callable[[torch.autograd.graph.Node], int] = methodcaller("_sequence_nr")

# The autograd node that is running on this thread, or None outside of a backward pass. No public API returns it.
# Replacement: hooks on the nodes.
current_node: Callable[[], torch.autograd.graph.Node | None] = torch._C._current_autograd_node

# An assertion that a GPU makes when it comes to it, so that nothing waits. Not public. Replacement: read the
# value, which cannot be captured in a CUDA graph.
assert_async = torch._assert_async

# Whether several elements of a tensor share memory, as in an expanded one, which cannot be written to. Replacement:
# compare sizes and strides.
has_internal_overlap = torch._debug_has_internal_overlap

# The level of forward-mode differentiation that is open, in which saved tensors are other objects; -1 outside. It is a
# partial, so that asking makes no Python call. Replacement: treat every call as in forward mode (slower).
forward_mode_level: Callable[[], int] = partial(getattr, torch.autograd.forward_ad, "_current_level")

# How many tensors and Python objects refer to a storage, by its address. There is no public way to ask. Replacement:
# never write a stream over (a stream more of memory).
storage_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def never_compile(function: Callable[..., object]) -> None:
    """Have `torch.compile` leave alone `function`, and the functions that it defines inside itself.

    Saved-tensor hooks are called while a compiled residual function runs, and would each be traced and guarded.
    Replacement: `torch.compiler.disable`, whose wrapper costs more than the hooks do.
    """
    strategy = getattr(eval_frame, "_FrameExecStrategy", None)
    if strategy is None:
        return  # An optimization alone: releases that name it otherwise trace the hooks.
    skip = strategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    for constant in (function.__code__, *function.__code__.co_consts):
        if isinstance(constant, CodeType):
            eval_frame.set_code_exec_strategy(constant, skip)


def call_after_backward(callback: Callable[[], None]) -> bool:
    """Have the autograd engine call `callback` when this backward pass ends; False outside of a backward pass.

    DistributedDataParallel and FSDP depend on the same call. Replacement: `Tensor.register_hook` on the lowest stream.
    """
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except RuntimeError:  # Outside of a backward pass: the caller looks at `grad_fn._saved_*`.
        return False
    return True


Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """Run a function while `torch.compile` traces its caller, and take the result for a constant.

    Arguments that are objects (modules, couplings) are guarded by identity: exchanging one recompiles.

    Reason: `torch.compiler.assume_constant_result` does the same, but loads the whole compiler when this module is
    imported. When the attribute disappears: call the public function, and measure `import revnet`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def fakes_for_a_trial(fake: Tensor) -> Iterator[None]:
    """Let operators mix `fake` with real tensors, which then count as fake ones, and read values that it does not have.

    Reason: a residual function may use tensors that the trace does not know, such as a constant in an attribute, and
    may ask for values, for which the mode of a fake tensor makes up symbols. Its results are discarded. There is no
    public way to reach that mode. When it disappears: such functions cannot be traced, and their error must say so.
    """
    mode = detect_fake_mode(fake)
    assert mode is not None
    allowed = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        with nullcontext() if mode.shape_env is None else mode.shape_env.ignore_fresh_unbacked_symbols():
            yield
    finally:
        mode.allow_non_fake_inputs = allowed


def depends_on_values() -> tuple[type[Exception], ...]:
    """Return the exceptions of a program that depends on values when it runs on fake tensors.

    Reason: none of them is public. When they disappear: catch what replaces them, of which
    `torch._subclasses.fake_tensor` has a list.
    """
    # Not at the head of this file, since it loads SymPy; whoever traces has loaded it already.
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


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
