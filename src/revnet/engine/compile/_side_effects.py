"""Detect side effects of residual functions, which would never reach the caller of a compiled graph.

The usual case is an auxiliary loss: a function appends it to a list, or sets an attribute, and the caller adds it to
the loss. An operator runs the function on tensors that are not connected to the caller's graph, so such a loss would
silently lose its gradient. Three checks detect every side effect: containers among the arguments are compared after
each call; attributes of the modules are compared while tracing; and after each call of the forward pass, nothing may
hold the graph any more.
"""

import gc
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from revnet._torch_internals import tree_flatten
from revnet.engine._tracing import CannotCompileError

_CONTAINERS = (list, dict, set, deque)
# Hooks, and the things that a program swaps itself: parameters, buffers and flags.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))


def _refusal(name: str, what: str) -> CannotCompileError:
    return CannotCompileError(
        f"`{name}` {what}, which a compiled reversible sequence can neither pass to its caller nor repeat in the "
        "backward pass; compile the residual functions instead (`block.f.compile(); block.g.compile()`), or store the "
        "block's activations with the policy `Store()`."
    )


def drawing_coupling(name: str) -> CannotCompileError:
    """Return the error for a coupling that draws random numbers when it combines a residual with the stream."""
    return CannotCompileError(
        f"the coupling of `{name}` draws random numbers, which its inverse cannot repeat; draw them in a residual "
        "function, or store the block's activations with the policy `Store()`."
    )


def check_arguments(name: str, arguments: Any, flat: Sequence[Any], spec: Any) -> None:
    """Raise if a function changed a list or dict among its arguments, which were flattened to `flat` and `spec`.

    Raises:
        CannotCompileError: The function changed one.
    """
    # The arguments were assembled for this call, so any change came from the function.
    leaves, spec_now = tree_flatten(arguments)
    if spec_now != spec or any(now is not before for now, before in zip(leaves, flat, strict=True)):
        raise _refusal(name, "filled a list or dict among its arguments")


class Attributes:
    """The current attributes of a function's modules, including the lists and dicts in them.

    Args:
        function: The residual function.
    """

    def __init__(self, function: nn.Module):
        self._modules = [(module, own_attributes(module)) for module in function.modules()]
        values = [value for _, attributes in self._modules for value in attributes.values()]
        self._containers = [(container, container.copy()) for value in values for container in _containers(value)]

    def changed(self) -> str | None:
        """Return a description of the first thing that has changed, or None."""
        for module, before in self._modules:
            now = own_attributes(module)
            # Tensors that hooks set again before each call are the same in both runs.
            for key in (now.keys() | before.keys()) - _set_by_hooks(module):
                if key not in now or key not in before or not _is_same(now[key], before[key]):
                    return f"`{key}` of {type(module).__name__}"
        for container, saved in self._containers:
            if not _has_same_items(container, saved):
                return f"a {type(container).__name__}"
        return None

    def put_back(self) -> None:
        """Undo all changes."""
        for module, before in self._modules:
            # In place, because modules and containers may be known by identity elsewhere.
            for key in own_attributes(module).keys() - before.keys():
                del vars(module)[key]
            vars(module).update(before)
        for container, saved in self._containers:
            container.clear()
            container.update(saved) if isinstance(container, (dict, set)) else container.extend(saved)


def check_attributes(name: str, before: Attributes) -> None:
    """Raise if a function has changed an attribute of its modules since `before`.

    Raises:
        CannotCompileError: The function changed one.
    """
    changed = before.changed()
    if changed is not None:
        raise _refusal(name, f"changes {changed} in every call")


def check_no_graph_left(name: str, leaves: Iterable["weakref.ref[Tensor]"], cyclic: set[str]) -> None:
    """Raise if something holds the graph of a finished call, which keeps the leaves of the graph alive.

    Args:
        name: The name of the function.
        leaves: The leaves of the graph.
        cyclic: The names of functions that leave reference cycles, which hold a graph unintentionally. The check adds a
            function if a garbage collection frees its graph. Since that is slow, it skips the function from then on.

    Raises:
        CannotCompileError: Something holds the graph.
    """
    # A graph refers to its leaves, and PyTorch keeps the Python object of a tensor as long as the tensor.
    alive = [leaf for leaf in leaves if leaf() is not None]
    if alive and name not in cyclic:
        gc.collect()
        if any(leaf() is not None for leaf in alive):
            raise _refusal(name, "keeps a tensor that it computed")
        cyclic.add(name)


def drop_graphs_of_hooks(function: nn.Module) -> None:
    """Detach the tensors that hooks, such as in weight norm and pruning, set again before each call."""
    for module in function.modules():
        for name in _set_by_hooks(module):
            tensor = vars(module).get(name)
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                vars(module)[name] = tensor.detach()


def _set_by_hooks(module: nn.Module) -> set[str]:
    # The hooks are objects with the name of the tensor that they set; pruning calls it `_tensor_name`.
    hooks = module._forward_pre_hooks.values()
    names = {getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks}
    return {name for name in names if isinstance(name, str)}


def _containers(value: Any) -> Iterator[Any]:
    """Yield the value, if it is a container such as a list or dict, and all containers inside it."""
    seen: set[int] = set()
    remaining = [value]
    while remaining:
        current = remaining.pop()
        # By identity: a container may contain itself, and a list has no hash.
        if id(current) in seen or not isinstance(current, (*_CONTAINERS, tuple)):
            continue
        seen.add(id(current))
        remaining.extend(current.values() if isinstance(current, dict) else current)
        if isinstance(current, _CONTAINERS):
            yield current


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module has in addition to those of every module."""
    return {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}


def _has_same_items(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and _is_same(value, b[key]) for key, value in a.items())
    return bool(a == b) if isinstance(a, set) else all(map(_is_same, a, b))


def _is_same(a: Any, b: Any) -> bool:
    # Tensors by identity, because comparing values is slow, and impossible for fake tensors.
    return a is b or (type(a) is type(b) and isinstance(a, _CONSTANTS) and a == b)
