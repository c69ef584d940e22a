"""A trial run of modules, which changes nothing that lasts."""

import copy
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revnet._torch_internals import HOOK_NAMES
from revnet.nn._exchanged_class import is_cache

_DICTS = (dict, OrderedDict, defaultdict)
_LISTS = (list, deque)
trial_lock = threading.RLock()
"""Held during a trial. Of two at once, one would take the substitutes of the other for what the modules hold."""


@contextmanager
def on_trial(modules: Iterable[nn.Module], *, is_wide: bool) -> Iterator[None]:
    """Run modules without hooks, and with substitutes for all tensors and containers that they may write to.

    The modules themselves run, since not everything that a module holds can be copied. On exit, all attributes are what
    they were. A parameter that is 0 throughout would hide what comes before it in a residual function, and has random
    values inside.

    Args:
        modules: The modules.
        is_wide: Whether tensors of low precision are float32 inside.
    """
    with trial_lock:
        # Modules of `torch.jit` keep their state elsewhere; copies of them stand in for them.
        found = [vars(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        before = [(attributes, dict(attributes)) for attributes in found]
        substitutes = Substitutes(is_wide=is_wide)
        try:
            for attributes, own in before:
                attributes.update({name: substitutes.of(value) for name, value in own.items()})
                attributes.update({name: OrderedDict() for name in HOOK_NAMES}, _compiled_call_impl=None)
            yield
        finally:
            for attributes, own in before:
                for name in attributes.keys() - own.keys():
                    del attributes[name]
                attributes.update(own)


class Substitutes:
    """What stands in for values during a trial: one substitute for each value.

    Args:
        is_wide: Whether substitutes of tensors of low precision are float32.
    """

    def __init__(self, *, is_wide: bool):
        self._is_wide = is_wide
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """Return the substitute of a value, which may be the value itself."""
        if id(value) in self._made:
            return self._made[id(value)]
        made = self._made[id(value)] = self._shell(value)
        # Filled only now, since a container may hold itself.
        if type(value) in _DICTS:
            made.update({key: self.of(member) for key, member in value.items()})
        elif type(value) in _LISTS:
            made.extend([self.of(member) for member in value])
        return made

    def _shell(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (*_DICTS, *_LISTS):
            shell = copy.copy(value)
            shell.clear()
            return shell
        if isinstance(value, torch.jit.ScriptModule):
            copied = copy.deepcopy(value)
            return copied.float() if self._is_wide else copied
        if is_cache(value):
            return _copy_of_cache(value)
        return copy.copy(value) if type(value) is set else value

    def _tensor(self, value: Tensor) -> Tensor:
        is_low = value.dtype in (torch.bfloat16, torch.float16)
        made = value.detach().float() if self._is_wide and is_low else value.detach().clone()
        # Not for parameters of other classes, which may be sharded: reading them would wait for other processes.
        if type(value) is not nn.Parameter or value.layout is not torch.strided or value.is_meta:
            return made
        return made if not made.is_floating_point() or made.any() else torch.rand_like(made)


def _copy_of_cache(cache: Any) -> Any:
    """Return a copy of a cache, which each run changes.

    Raises:
        TypeError: It cannot be copied.
    """
    try:
        with _CopiesOfGraphs():
            return copy.deepcopy(cache)
    except Exception as error:
        raise TypeError(
            f"a {type(cache).__name__} cannot be copied, so `branches` cannot be compared with a block that changes "
            "it; call the model without it, or leave `branches` out."
        ) from error


class _CopiesOfGraphs(TorchFunctionMode):
    """Inside, tensors that have a graph can be copied; the copies have none."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))
