"""All uses of undocumented parts of PyTorch, with the reason and the replacement if a release removes them.

Start an upgrade of PyTorch with this file.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import attrgetter, methodcaller
from types import CodeType
from typing import Any

# First, because it raises if PyTorch is too old for the imports below.
import revnet._torch_release  # noqa: F401

# isort: split

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

# Fake tensors, which have shapes and no values, the modes that make them, and the exceptions that they raise if a value
# is needed. Only PyTorch's developer notes document them. Predictions of memory depend on them. Replacement: none.
from torch._guards import active_fake_mode as active_fake_mode
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException as UnsupportedFakeTensorException
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily

# The base class of dispatch modes, and the flattening of nested arguments that `torch.compile` can trace. Only
# PyTorch's developer notes document them. Replacement: none. Nothing else sees each operator of a call, and
# `torch.compile` does not recognize any other flattening.
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass_type as is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten

# The public context manager `torch.autograd.graph.saved_tensors_hooks` calls these two. Around every residual function
# it would cost three times more. Replacement: the context manager.
push_saved_tensors_hooks = torch._C._autograd._push_saved_tensors_default_hooks
pop_saved_tensors_hooks = torch._C._autograd._pop_saved_tensors_default_hooks

# `torch.enable_grad` and `torch.no_grad` call this. Replacement: `torch.set_grad_enabled`, which is slower.
set_grad_enabled = torch._C._set_grad_enabled

# The number that the next node of the autograd graph on this thread will get. A tensor whose node has a lower number
# was computed earlier. No public API returns it. Replacement: run a cheap operation and read the number of its node.
next_sequence_number = torch._C._autograd._get_sequence_nr

# Whether a transform of `torch.func` is active, so that tensors have no values. Replacement: catch the error that
# reading a value raises.
in_functorch_transform = torch._C._are_functorch_transforms_active

# Whether `torch.jit.trace` is running. Replacement: `torch.jit.is_tracing`, which makes a Python call.
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing

# Whether a gradient stands for several ones, with `is_grads_batched=True` or `vectorize=True`. A tensor that is not
# batched cannot be overwritten with one that is. Replacement: write to no tensor in a backward pass.
is_batched_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor

# Not None while `torch.func.grad` and similar transforms forbid saved-tensor hooks. Replacement: match their error.
hooks_are_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message

# Whether a profiler is on. Each replay asks, so that it builds the name of its range only for a profiler. Replacement:
# always enter `record_function`.
profiler_is_on: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


# Whether autocast is on for any type of device. Each replay asks. Replacement: `torch.is_autocast_enabled` for each
# type of device that the run uses.
any_autocast_is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled


# The number of active modes of each kind, which may replace any operation. Replacement: search every call.
num_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# The dicts of the hooks that a module calls. `torch.compile` cannot trace this function. Replacement: assume that every
# module has hooks, which is slower.
HOOK_NAMES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
hooks_of: Callable[[nn.Module], tuple[Any, ...]] = attrgetter(*HOOK_NAMES)

# Whether a hook is registered on all modules. A block that is not called would miss it. Registering such a hook is
# public, but asking for one is not. Replacement: call every block, which is slower.
has_global_module_hook = _has_any_global_hook

# Whether PyTorch was built for an accelerator. `torch.accelerator` is public since 2.6.
HAS_ACCELERATOR = torch.accelerator.current_accelerator() is not None


# The position of a node in the order in which its thread created nodes. Replacement: as for `next_sequence_number`.
sequence_number_of: Callable[[torch.autograd.graph.Node], int] = methodcaller("_sequence_nr")

# The autograd node that is running on this thread, or None outside of a backward pass. No public API returns it.
# Replacement: hooks on the nodes.
current_node: Callable[[], torch.autograd.graph.Node | None] = torch._C._current_autograd_node


def is_vmapped() -> bool:
    """Return whether `torch.func.vmap` is the only transform that is active, in a forward pass.

    Tensors that are saved under `vmap` no longer exist in a backward pass outside of it, so nothing can run again
    there. No public API says so; without this, the backward pass would raise.
    """
    if not in_functorch_transform() or current_node() is not None:
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return all(interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack)


# An assertion that runs on the GPU, so that the CPU does not wait for it. Replacement: read the value, which cannot be
# captured in a CUDA graph.
assert_async = torch._assert_async

# Whether several elements of a tensor share memory, as in an expanded one, which cannot be written to. Replacement:
# compare sizes and strides.
has_internal_overlap = torch._debug_has_internal_overlap

# The level of forward-mode differentiation, or -1 outside. Inside, saved tensors are different objects. As a `partial`
# it does not make a Python call. Replacement: treat every call as in forward mode, which is slower.
forward_mode_level: Callable[[], int] = partial(getattr, torch.autograd.forward_ad, "_current_level")

# The number of tensors and Python objects that refer to a storage, by its address. No public API returns it.
# Replacement: never overwrite a stream, which takes memory for one more stream.
storage_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


# Whether the current backward pass keeps its graph, for the function below. Replacement: none; a second backward pass
# through the graph then raises an error that does not name the cause.
_keeps_graph: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


# The number of the backward pass that runs on this thread, or -1 outside of one. Replacement: treat every moment as
# outside, which only fetches nothing ahead, and never says that a graph is kept.
current_backward: Callable[[], int] = torch._C._current_graph_task_id


def backward_keeps_graph() -> bool:
    """Return whether a backward pass is running that keeps its graph, by `retain_graph` or `create_graph`."""
    is_running = current_backward() != -1
    return is_running and _keeps_graph is not None and _keeps_graph()


def post_gradient_hooks(parameter: Tensor) -> dict[int, Callable[..., object]]:
    """Return the hooks that run after `parameter` has accumulated a gradient. Removing one from the dict disables it.

    Registering such a hook is public, but asking for one is not. Replacement: none.
    """
    hooks: dict[int, Callable[..., object]] | None = parameter._post_accumulate_grad_hooks
    return {} if hooks is None else hooks


def step_pre_hooks(optimizer: Optimizer) -> list[Callable[..., object]]:
    """Return the hooks that run before each step of `optimizer`, including hooks for all optimizers.

    Registering such a hook is public, but asking for one is not. Replacement: none.
    """
    return [*_global_optimizer_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()]


def never_compile(function: Callable[..., object]) -> None:
    """Keep `torch.compile` from tracing `function` and the functions that it defines.

    A compiled residual function calls saved-tensor hooks while it runs, and each of them would be traced and guarded.
    Replacement: `torch.compiler.disable`, whose wrapper costs more than the hooks.
    """
    strategy = getattr(eval_frame, "_FrameExecStrategy", None)
    if strategy is None:
        return  # It is only an optimization. Without it, the hooks are traced.
    skip = strategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    for constant in (function.__code__, *function.__code__.co_consts):
        if isinstance(constant, CodeType):
            eval_frame.set_code_exec_strategy(constant, skip)


def must_be_one_graph() -> bool:
    """Return whether `torch.compile` may not end the graph that it traces, as with `fullgraph=True`.

    Only functions that are constant while tracing may call it. Replacement: none; users would see the error of PyTorch,
    in which the reason of `run_between_graphs` is one line of many.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    return any(getattr(translator, name, False) is True for name in ("one_graph", "error_on_graph_break"))


def run_between_graphs(function: Callable[..., object], reason: str) -> None:
    """Let `torch.compile` end its graph before a call of `function`, and run the call eagerly.

    `torch.compiler.disable` sets the same attributes.
    Replacement: `torch.compiler.disable`, which imports the compiler, and this takes seconds.

    Args:
        function: The function, all code that it runs included.
        reason: Text for the error of `fullgraph=True`.
    """
    vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
    run_as_it_is(function)


def run_as_it_is(function: Callable[..., object]) -> None:
    """Keep `torch.compile` from compiling a call of `function` that is not part of a graph, all that it runs included.

    A graph may still contain the call. `torch.compiler.disable` sets the same strategy. Replacement: none; a part of
    the function becomes a graph of its own.
    """
    strategy = getattr(eval_frame, "_FrameExecStrategy", None)
    if strategy is not None:
        skip = strategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
        eval_frame.set_code_exec_strategy(function.__code__, skip)


def call_after_backward(callback: Callable[[], None]) -> bool:
    """Call `callback` when the current backward pass ends. Return False outside of a backward pass.

    DistributedDataParallel and FSDP depend on the same call. Replacement: `Tensor.register_hook` on the lowest stream.
    """
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except RuntimeError:  # Outside of a backward pass: the caller looks at `grad_fn._saved_*`.
        return False
    return True


def detached_alias(tensor: Tensor) -> Tensor:
    """Return an alias of a tensor that shares its version counter, also below autograd.

    Reason: in a dispatch mode, `detach` returns a tensor with a version counter of its own, which shows no writes.
    `torch.utils.checkpoint` does the same. When it disappears: find out how that module does it.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


# The innermost dispatch mode, or None, and a context that takes it off. Code in which nothing is kept for a replay runs
# without our mode, which costs some microseconds for each operator. Replacement: run the code in the mode.
current_dispatch_mode: Callable[[], TorchDispatchMode | None] = _get_current_dispatch_mode
without_current_mode: Callable[[], AbstractContextManager[TorchDispatchMode]] = _pop_mode_temporarily

# Code inside runs without any dispatch mode, fake tensors included, several times faster than under
# `unset_fake_temporarily`. Replacement: that and `without_current_mode`.
without_dispatch: Callable[[], AbstractContextManager[None]] = torch._C._DisableTorchDispatch


@contextmanager
def outside_of_traces() -> Iterator[None]:
    """Compute tensors as usual while `torch.export` or `torch.jit.trace` is running; they are constants of the program.

    Reason: no public context leaves a trace. When it disappears: compute the tensors before the trace.
    """
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@contextmanager
def without_parametrization_cache() -> Iterator[None]:
    """Compute parametrized tensors as outside of `torch.nn.utils.parametrize.cached`, and leave its cache alone.

    Reason: the cache may hold tensors that were computed from other parameters, and no public API sets it aside. When
    it disappears: raise in a second run of a module while the cache is on.
    """
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


def is_composite(operator: torch._ops.OpOverload) -> bool:
    """Return whether PyTorch replaces an operator by others before it runs, so that no dispatch mode sees it.

    Reason: only the dispatcher knows. When it disappears: call the operator under a mode that records operators.
    """
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


@contextmanager
def fakes_for_a_trial(fake: Tensor) -> Iterator[None]:
    """Let operators mix `fake` with real tensors and read values, which the mode of `fake` makes up.

    Reason: a residual function may use tensors that the trace does not know, such as a constant in an attribute, and it
    may read values. The results of the call are discarded. No public API returns the mode of a fake tensor. When it
    disappears: such functions cannot be traced, and their error must say so.
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

    Reason: the exceptions are not public. When they disappear: catch their replacements, which are listed in
    `torch._subclasses.fake_tensor`.
    """
    # Not at the top of this file, because this import loads SymPy, which tracing has already loaded.
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


def autograd_in_operators() -> AbstractContextManager[None]:
    """Return a context that records a graph inside an operator, where autograd is switched off.

    Reason: only autograd knows which parameters a result depends on; `torch.enable_grad` does not suffice, since the
    dispatcher skips autograd altogether below an operator that has a backward formula. When it disappears: run the same
    code in a new thread, whose dispatcher starts without the exclusion.
    """
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    return guard


def bucket_assignment(parameters: list[Tensor], limits: list[int]) -> list[list[int]]:
    """Return the indices of the parameters in each bucket of DistributedDataParallel, for its limits in bytes.

    Reason: a prediction must count the same buckets. When it disappears: repeat the rule, which fills a bucket until it
    reaches its limit.
    """
    assign: Callable[..., tuple[list[list[int]], list[int]]] = vars(torch.distributed)[
        "_compute_bucket_assignment_by_size"
    ]
    return assign(parameters, limits, [False] * len(parameters), list(range(len(parameters))))[0]


def broadcast_buffers(group: torch.distributed.ProcessGroup, buffers: list[Tensor], most_bytes: int) -> None:
    """Broadcast tensors in pieces of at most `most_bytes`, as DistributedDataParallel does in each forward pass.

    Reason: a prediction must count the same broadcasts. When it disappears: call `torch.distributed.broadcast` on the
    flattened tensors.
    """
    vars(torch.distributed)["_broadcast_coalesced"](group, buffers, most_bytes, 0)


def fake_store() -> Any:
    """Return a store for the process group "fake", whose collectives return at once, and register this backend.

    Reason: it lets one process run the code of one of many. Only PyTorch's own tests document it. When it disappears:
    define a process group whose collectives do nothing.
    """
    # Not at the top of this file, because few callers need this import.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def python_operator(operator: Any) -> Callable[..., Any] | None:
    """Return the Python function behind PyTorch's operator for a linear layer with cross-entropy in chunks, else None.

    Reason: a dispatch mode sees one operator, and not the memory that the function allocates. When it disappears, or
    becomes a kernel: return None, after which memory inside the operator is not counted.
    """
    if operator.namespace != "torch_nn":
        return None
    # Not at the top of this file, because PyTorch imports this module when the operator is first called.
    from torch.nn.modules import linear_cross_entropy

    definition = getattr(linear_cross_entropy, operator._opname, None)
    function: Callable[..., Any] | None = getattr(definition, "_init_fn", None)
    return function
