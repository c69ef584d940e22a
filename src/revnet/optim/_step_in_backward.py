"""Run an optimizer's step within the backward pass."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from torch import Tensor
from torch.optim import Optimizer

from revnet._checks import describe
from revnet._torch_internals import backward_keeps_graph, post_gradient_hooks, step_pre_hooks
from revnet.optim._update import update_parameter
from revnet.optim._used_gradient import UsedGradient


class StepInBackward:
    """Update each parameter as soon as its gradient is complete, and free the gradient.

    An ordinary training step keeps the gradients of all parameters until `optimizer.step()`. With this class, only one
    gradient is alive at a time. It complements reversible networks, whose activations do not grow with depth: in a
    deeper network, only parameters and optimizer state need more memory.

    The training loop does not change, and it must still call `optimizer.step()`. The call finds no gradients, advances
    the schedulers' counters, and runs the hooks that follow a step. `optimizer.step(closure)`, which Lightning uses,
    works too. Parameters and state are equal to the results of ordinary steps, bit for bit, and state dicts have the
    same format. Parameters without a gradient are skipped, as usual.

    The optimizer keeps the object alive. To return to ordinary steps, call `remove`, or use the object as a context
    manager.

    Code that needs gradients after the backward pass raises an error: gradient accumulation, which is a second backward
    pass before `optimizer.step()`; a retained graph; `clip_grad_norm_`; `GradScaler`; and `DistributedDataParallel`.
    FSDP2 (`fully_shard`) works. To clip by value, register a hook on each parameter with `Tensor.register_hook`; it
    receives the complete gradient.

    Every backward pass updates the parameters that it reaches. `torch.autograd.grad` does not. If a backward pass fails
    halfway, some parameters are already updated: load a checkpoint of the model and the optimizer. A forward pass that
    reads a parameter without autograd's knowledge, as `parameter.data`, gives wrong gradients if the backward pass
    reads the same memory after the update.

    CUDA is experimental: the class was tested on CPUs only.

    Args:
        optimizer: Any optimizer of `torch.optim` except `LBFGS`, or another one that updates every parameter by
            itself. Parameter groups that are added later, and parameters that are unfrozen later, join after the next
            `optimizer.step()`.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: The optimizer already steps in the backward pass.
        NotImplementedError: The optimizer needs a closure, is differentiable, or has a hook that runs before its step.

    References:
        Lv et al. (2023), Full Parameter Fine-tuning for Large Language Models with Limited Resources (LOMO).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> from revnet.optim import StepInBackward
        >>> block = ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> model = ReversibleSequential(block)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> step_in_backward = StepInBackward(optimizer)
        >>> for _ in range(3):
        ...     loss = model(torch.randn(2, 8)).square().mean()
        ...     loss.backward()  # updates the parameters
        ...     optimizer.step()  # ends the step
        ...     optimizer.zero_grad()
    """

    def __init__(self, optimizer: Optimizer):
        check_optimizer(optimizer)
        # The optimizer refers to this object. If this object also referred to the optimizer, only the garbage collector
        # could free the parameters after training.
        self._optimizer = weakref.ref(optimizer)
        self._updated: set[Tensor] = set()
        self._options: dict[int, dict[str, Any]] = {}
        self._watched: set[tuple[int, int]] = set()
        self._removals: list[Callable[[], None]] = [
            optimizer.register_step_pre_hook(self._begin_step).remove,
            optimizer.register_step_post_hook(self._end_step).remove,
            optimizer.register_load_state_dict_post_hook(self._forget).remove,
        ]
        self._watch(optimizer)

    def remove(self) -> None:
        """Return to ordinary steps."""
        self._forget()
        while self._removals:
            self._removals.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def _watch(self, optimizer: Optimizer) -> None:
        """Register a hook on each trained parameter that has none."""
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.requires_grad and (group_index, index) not in self._watched:
                    handle = parameter.register_post_accumulate_grad_hook(partial(self._update, group_index))
                    self._removals.append(handle.remove)
                    self._watched.add((group_index, index))

    def _update(self, group_index: int, parameter: Tensor) -> None:
        """Update a parameter whose gradient has just been accumulated."""
        optimizer = self._optimizer()
        if optimizer is None or parameter.grad is None:
            return
        _check_pre_hooks(optimizer)
        if parameter in self._updated:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} received a second gradient before `optimizer.step()`, "
                "but `StepInBackward` has already used the first; call `optimizer.step()` after every backward pass, "
                "or train without `StepInBackward`."
            )
        if backward_keeps_graph():
            raise RuntimeError(
                "`retain_graph` or `create_graph` (=True) of a backward pass keeps the graph, but `StepInBackward` "
                "changes the parameters that it needs; differentiate with `torch.autograd.grad`, or train without "
                "`StepInBackward`."
            )
        if group_index not in self._options:
            self._options[group_index] = _options(optimizer, group_index)
        update_parameter(optimizer, group_index, parameter)
        self._updated.add(parameter)
        parameter.grad = UsedGradient.of(parameter)

    def _begin_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remove the placeholders before the step, or after its closure if it has one."""
        _check_pre_hooks(optimizer)
        self._end_updates(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None

        def closure_with_updates() -> Any:
            loss = closure()
            self._end_updates(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_with_updates}
        return (args[0], closure_with_updates, *args[2:]), kwargs

    def _end_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._forget(optimizer)
        self._watch(optimizer)

    def _forget(self, _: Any = None) -> None:
        """End the current step; loading a checkpoint after a failure does so, too."""
        self._drop_placeholders()
        self._updated.clear()
        self._options.clear()

    def _end_updates(self, optimizer: Optimizer) -> None:
        """Remove the placeholders, so that the step finds no gradients."""
        for group_index, options in self._options.items():
            if options != (now := _options(optimizer, group_index)):
                name = next(name for name in {**options, **now} if options.get(name) != now.get(name))
                raise RuntimeError(
                    f"`{name}` of parameter group {group_index} changed from {options.get(name)} to {now.get(name)} "
                    "between the backward pass and `optimizer.step()`, but `StepInBackward` updates the parameters in "
                    "the backward pass; change it before, or after the step."
                )
        self._drop_placeholders()

    def _drop_placeholders(self) -> None:
        for parameter in self._updated:
            if isinstance(parameter.grad, UsedGradient):
                parameter.grad = None


def _options(optimizer: Optimizer, group_index: int) -> dict[str, Any]:
    """Return the options of a group that can be compared without waiting for a device."""
    group = optimizer.param_groups[group_index]
    return {name: value for name, value in group.items() if isinstance(value, bool | int | float | tuple)}


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` can step in a backward pass; for the errors see `StepInBackward`."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` (={describe(optimizer)}) must be a `torch.optim.Optimizer`.")
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise NotImplementedError(
            f"`optimizer` (={name}) evaluates the loss several times in a step, by a closure, so its step cannot run "
            "in a backward pass; use another optimizer, such as `torch.optim.AdamW`."
        )
    if any(group.get("differentiable", False) for group in optimizer.param_groups):
        raise NotImplementedError(
            f"`optimizer` (={name} with `differentiable=True`) keeps the graph of its step, but `StepInBackward` frees "
            "each gradient; leave `differentiable` out."
        )
    if any(_owner(hook) is not None for hook in step_pre_hooks(optimizer)):
        raise ValueError(f"`optimizer` (={name}) already steps in the backward pass; call `StepInBackward` once.")
    _check_pre_hooks(optimizer)


@contextmanager
def suspended(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Keep backward passes from updating the parameters."""
    removed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for parameter in parameters:
        hooks = post_gradient_hooks(parameter)
        updates = {key: hook for key, hook in hooks.items() if _owner(hook) is not None}
        for key in updates:
            del hooks[key]
        removed.append((hooks, updates))
    try:
        yield
    finally:
        for hooks, updates in removed:
            hooks.update(updates)


def _owner(hook: Any) -> StepInBackward | None:
    """Return the object that registered the hook, or None if it was something else."""
    owner = getattr(getattr(hook, "func", hook), "__self__", None)
    return owner if isinstance(owner, StepInBackward) else None


def _check_pre_hooks(optimizer: Optimizer) -> None:
    """Raise if a hook must run before the step, when all gradients exist."""
    if any(_owner(hook) is None for hook in step_pre_hooks(optimizer)):
        raise NotImplementedError(
            f"`optimizer` (={type(optimizer).__name__}) has a hook that runs before its step, but `StepInBackward` "
            "updates the parameters earlier; remove the hook, or use `register_step_post_hook`."
        )
