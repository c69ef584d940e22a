"""The releases of PyTorch that revnet supports, and what the older ones among them need.

Each part says which releases need it. When the oldest supported release rises, delete what it no longer needs.
"""

import ctypes
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from revnet.errors import MissingDependencyError

OLDEST = (2, 11)
"""Oldest release that passes the tests. `pyproject.toml` declares the same one."""
NEWEST_TESTED = (2, 15)
"""Newest release that was tested."""


def release_of(version: str) -> tuple[int, int]:
    """Return the major and minor number of a version such as "2.13.0+cpu" or "2.16.0a0+git1234"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    assert match is not None, version
    return int(match[1]), int(match[2])


RELEASE = release_of(torch.__version__)
"""Release of PyTorch in use."""


def check_release(version: str) -> None:
    """Raise if a version of PyTorch is older than the oldest release that revnet supports."""
    if release_of(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingDependencyError(
            f"revnet needs PyTorch {oldest} or later, but version {version} is installed; run `pip install --upgrade "
            f"'torch>={oldest}'`."
        )


check_release(torch.__version__)

_is_untested = RELEASE > NEWEST_TESTED


def warn_if_untested() -> None:
    """Warn, once in a process, if PyTorch is newer than the newest tested release."""
    global _is_untested
    if _is_untested:
        _is_untested = False
        newest = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"PyTorch {torch.__version__} is newer than {newest}, the newest release that this version of revnet was "
            f"tested with; if something fails, install a newer revnet, or `torch=={newest}.*`.",
            stacklevel=2,
        )


# Functions that `torch.compile` runs while it traces ------------------------------------------------------------------

Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """Let `torch.compile` run a function while it traces the caller, and treat the result as a constant.

    Arguments must be constants for the trace. For a module or a coupling, use `constant_of_object`.

    Reason: `torch.compiler.assume_constant_result` does the same, but loads the whole compiler when this module is
    imported. When the attribute disappears: call the public function, and measure `import revnet`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


Of = TypeVar("Of", bound=Callable[[Any], object])


def constant_of_object(function: Of) -> Of:
    """Do the same for a function of one object, such as a module or a coupling.

    The object is guarded by identity, so another one causes a recompilation.
    """
    if RELEASE >= (2, 12):
        return constant_while_tracing(function)

    # Needed until 2.11, which passes only constants to such a function. The number that `id` returns is one, and
    # guards the object, which the trace keeps alive.
    @constant_while_tracing
    def at(address: int) -> object:
        return function(ctypes.cast(address, ctypes.py_object).value)

    def of(instance: Any) -> object:
        return at(id(instance))

    return of  # type: ignore[return-value]


# Whether `torch.export` runs. Until 2.12, `torch.compile` takes PyTorch's own function for the constant True. As a
# `partial`, the other form does not make a Python call.
is_exporting: Callable[[], bool] = (
    torch.compiler.is_exporting if RELEASE >= (2, 13) else partial(getattr, torch.compiler, "_is_exporting_flag")
)


@constant_while_tracing
def allow_default_coupling(kind: type) -> None:
    """Let `torch.compile` build a named tuple with a default of this class.

    Needed until 2.11, which can build defaults of Python's own classes only.
    """
    if RELEASE < (2, 12):
        from torch._dynamo.variables import UserDefinedObjectVariable, builder

        handlers: dict[type, Any] = vars(builder.SourcelessBuilder)["_type_handlers"]
        handlers.setdefault(kind, lambda _, value: UserDefinedObjectVariable(value))


@contextmanager
def without_compiled_functions() -> Iterator[None]:
    """Run functions that are compiled themselves uncompiled, while `torch.compile` traces their caller."""
    with torch.compiler.set_stance("force_eager"):
        if RELEASE >= (2, 12):
            yield
        else:
            # Until 2.11, a compiled function refuses to run there, whatever the stance.
            with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
                yield


@contextmanager
def unseen_sharding_trials() -> Iterator[None]:
    """Hide from the active modes the operations with which DTensor finds the shape of a result.

    Needed until 2.11, where an optimizer's step causes new trials, since its scalars are new, and the modes count what
    no process allocates. In later releases, the trials end with the warm-up.
    """
    if RELEASE >= (2, 12):
        yield
        return
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.utils._python_dispatch import _disable_current_modes

    name = "_propagate_tensor_meta_non_cached"
    try_shapes = getattr(ShardingPropagator, name)

    def try_unseen(*args: Any) -> Any:
        with _disable_current_modes():
            return try_shapes(*args)

    setattr(ShardingPropagator, name, try_unseen)
    try:
        yield
    finally:
        setattr(ShardingPropagator, name, try_shapes)


@constant_while_tracing
def has_autocast(device_type: str) -> bool:
    """Return whether PyTorch supports autocast on a type of device.

    Until 2.11, `torch.compile` cannot trace the function of PyTorch.
    """
    return torch.amp.is_autocast_available(device_type)


def is_autocast_on(device_type: str) -> bool:
    """Return whether autocast is on for a type of device; false for types without it, for which PyTorch raises."""
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


# FSDP -----------------------------------------------------------------------------------------------------------------


def convert_in_replays(modules: Iterable[nn.Module]) -> None:
    """Let FSDP convert the inputs and outputs of modules to its precision in a recomputation, as in the forward pass.

    Until 2.12, it does not, so that a function would run on a float32 stream with bfloat16 parameters.
    """
    if RELEASE >= (2, 13):
        return
    for module in fsdp_modules_in(modules):
        if not any(getattr(hook, "func", None) is _convert_inputs for hook in module._forward_pre_hooks.values()):
            state = module._get_fsdp_state()
            module.register_forward_pre_hook(partial(_convert_inputs, state), with_kwargs=True)
            module.register_forward_hook(partial(_convert_output, state))


def fsdp_modules_in(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the modules to which `fully_shard` was applied."""
    if "torch.distributed.fsdp" not in sys.modules:  # Importing it takes a second.
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules if isinstance(module, FSDPModule)]


def is_done_with_backward(module: Any) -> bool:
    """Return whether FSDP has already sharded the parameters of a module again after its backward pass.

    No public API says so.
    """
    state = module._get_fsdp_state()
    # A list since 2.13.
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return all(group is not None and group._training_state.name == "POST_BACKWARD" for group in groups)


def _convert_inputs(state: Any, _: nn.Module, args: Any, kwargs: Any) -> Any:
    policy = state._mp_policy
    wants = policy.cast_forward_inputs and policy.param_dtype is not None and _is_recomputing(state)
    return (_converted(args, policy.param_dtype), _converted(kwargs, policy.param_dtype)) if wants else None


def _convert_output(state: Any, _: nn.Module, args: Any, output: Any) -> Any:
    dtype = state._mp_policy.output_dtype
    return output if dtype is None or not _is_recomputing(state) else _converted(output, dtype)


def _is_recomputing(state: Any) -> bool:
    return bool(state._training_state.name == "PRE_BACKWARD")


def _converted(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value, values
    )
