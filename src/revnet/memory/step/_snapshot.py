"""Save what a model refers to, and bring it back."""

import functools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from operator import is_
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (OrderedDict, dict, list, deque, set)
_PLAIN = set(_CONTAINERS)
_MOST_VALUES = 200_000
"""Number of values after which objects inside objects are not looked at, as in a module that refers to a data set."""
_SEALED = (Tensor, type, types.ModuleType, types.FunctionType, Enum)
_OPEN = {"collections", "types", "functools", "weakref"}
"""Modules of the standard library whose objects may hold tensors of the user."""
_CLOSED = {"torch", "numpy"} | sys.stdlib_module_names
_CLOSED_CLASSES = _CLOSED | {"revnet"}
"""Packages whose classes keep no tensors as attributes of a class."""
_UNSET = object()


class Snapshot:
    """What modules and other values refer to, directly and indirectly.

    It has the items of lists, dicts and sets, and the attributes of objects, of unregistered modules and of their
    classes. Tensors, functions, and objects of the standard library or of PyTorch are values, which it does not look
    into.

    Args:
        modules: Modules to save.
        values: Other values to save.
        without: Modules that are left out, wherever they are found.
    """

    def __init__(self, modules: Iterable[nn.Module], values: Iterable[Any] = (), without: Iterable[nn.Module] = ()):
        modules, values = list(modules), list(values)
        self._saved: list[tuple[_Holder, list[Any]]] = []
        self._seen = {*map(id, modules), *map(id, without)}
        self._types: dict[type, _TypeInfo | None] = {}
        self._classes: set[type] = set()
        self._empty: list[Any] = []
        """Most containers are empty, such as a module's eight dicts of hooks. Noting that takes less time."""
        self._waiting: deque[Any] = deque()
        for module in modules:
            # First, and whatever the number of values, because fakes replace these.
            for holder in (module.__dict__, module._parameters, module._buffers):
                self._seen.add(id(holder))
                self._save(_Items(holder, OrderedDict if isinstance(holder, OrderedDict) else dict))
        for module in modules:
            self._save_class(type(module))
        self._look_at(values)
        while self._waiting and len(self._seen) < _MOST_VALUES:
            self._enter(self._waiting.popleft())
        self._waiting.clear()

    def replace(self, function: Callable[[Any], Any]) -> None:
        """Replace each tensor and tuple by what `function` returns for it."""
        for holder, content in self._saved:
            if any(isinstance(value, Tensor | tuple) for value in content):
                changed = [function(value) if isinstance(value, Tensor | tuple) else value for value in content]
                if not _are_same(changed, content):
                    holder.write(changed)

    def restore(self) -> None:
        """Restore everything that has changed since."""
        for holder, content in self._saved:
            if not _are_same(holder.read(), content):
                holder.write(content)
        for container in self._empty:
            if container:
                container.clear()

    def _save(self, holder: "_Holder") -> None:
        content = holder.read()
        self._saved.append((holder, content))
        self._look_at(content)

    def _look_at(self, values: Iterable[Any]) -> None:
        """Put the values that refer to others in the queue, each of them once."""
        for value in values:
            kind = type(value)
            info = self._types[kind] if kind in self._types else self._learn(kind)
            if kind in _PLAIN and not value:
                self._empty.append(value)
            elif info is not None and id(value) not in self._seen:
                self._seen.add(id(value))
                self._waiting.append(value)

    def _learn(self, kind: type) -> "_TypeInfo | None":
        info = self._types[kind] = _TypeInfo.of(kind)
        return info

    def _enter(self, value: Any) -> None:
        """Save what a value refers to."""
        info = self._types[type(value)]
        assert info is not None
        if info.container is not None:
            self._save(_Items(value, info.container))
        self._look_at(info.parts(value))
        if info.has_attributes:
            attributes = _attributes_of(value)
            if attributes is not None and id(attributes) not in self._seen:
                self._seen.add(id(attributes))
                self._save(_Items(attributes, dict))
            if info.slots:
                self._save(_Slots(value, info.slots))
            self._save_class(type(value))

    def _save_class(self, kind: type) -> None:
        """Save the attributes of a class and its bases, such as a cache that all its instances share."""
        if kind in self._classes:
            return
        self._classes.add(kind)
        for base in kind.__mro__:
            if id(base) not in self._seen and _root(base) not in _CLOSED_CLASSES:
                self._seen.add(id(base))
                self._save(_Class(base))


class _TypeInfo:
    """How the objects of a class refer to others."""

    def __init__(self, container: type | None, has_attributes: bool, slots: list[Any], parts: Callable[[Any], Any]):
        self.container = container
        self.has_attributes = has_attributes
        self.slots = slots
        self.parts = parts

    @classmethod
    def of(cls, kind: type) -> "_TypeInfo | None":
        """Return how objects of `kind` refer to others; None if they are not looked into."""
        container = next((base for base in _CONTAINERS if issubclass(kind, base)), None)
        parts: Callable[[Any], Any] = _no_parts
        if issubclass(kind, tuple | frozenset):
            parts = iter
        elif issubclass(kind, types.MethodType):
            parts = _parts_of_method
        elif issubclass(kind, functools.partial):
            parts = _parts_of_partial
        has_attributes = _has_attributes(kind)
        if container is None and parts is _no_parts and not has_attributes:
            return None
        return cls(container, has_attributes, list(_slots_of(kind)) if has_attributes else [], parts)


def _has_attributes(kind: type) -> bool:
    """Return whether to save the attributes of objects of this class."""
    if issubclass(kind, _SEALED):
        return False
    if issubclass(kind, nn.Module) or kind.__module__ in _OPEN or kind.__module__.startswith("torch.distributions."):
        return True
    return _root(kind) not in _CLOSED


def _slots_of(kind: type) -> Iterator[Any]:
    """Return the descriptors of the attributes for which a class written in Python has slots."""
    for base in kind.__mro__:
        if "__slots__" in vars(base):
            yield from (value for value in vars(base).values() if isinstance(value, types.MemberDescriptorType))


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the dict of an object without running code of its class."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


def _no_parts(value: Any) -> Iterable[Any]:
    return ()


def _parts_of_method(value: Any) -> Iterable[Any]:
    return (value.__self__,)


def _parts_of_partial(value: Any) -> Iterable[Any]:
    return value.func, value.args, value.keywords


def _root(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


def _are_same(values: list[Any], others: list[Any]) -> bool:
    return len(values) == len(others) and all(map(is_, values, others))


# Holders --------------------------------------------------------------------------------------------------------------


class _Items:
    """The items of a container, read and written without the methods that its class may override."""

    def __init__(self, container: Any, base: Any):
        self._container = container
        self._base = base

    def read(self) -> list[Any]:
        """Return the items; the keys of a dict, and then its values."""
        base, container = self._base, self._container
        if issubclass(base, dict):
            return [*base.keys(container), *base.values(container)]
        return list(base.__iter__(container))

    def write(self, content: list[Any]) -> None:
        """Replace the items."""
        base, container = self._base, self._container
        base.clear(container)
        if issubclass(base, dict):
            middle = len(content) // 2
            for key, value in zip(content[:middle], content[middle:], strict=True):
                base.__setitem__(container, key, value)
        elif base is set:
            set.update(container, content)
        else:
            base.extend(container, content)


class _Slots:
    """The attributes of an object that are in slots."""

    def __init__(self, owner: Any, slots: list[Any]):
        self._owner = owner
        self._slots = slots

    def read(self) -> list[Any]:
        """Return the values of the slots."""
        return [self._read(slot) for slot in self._slots]

    def _read(self, slot: Any) -> Any:
        try:
            return slot.__get__(self._owner)
        except AttributeError:
            return _UNSET

    def write(self, content: list[Any]) -> None:
        """Set the slots, also of a frozen dataclass."""
        for slot, value in zip(self._slots, content, strict=True):
            if value is not _UNSET:
                slot.__set__(self._owner, value)
            elif self._read(slot) is not _UNSET:
                slot.__delete__(self._owner)


class _Class:
    """The attributes of a class, except the ones of Python."""

    def __init__(self, kind: type):
        self._kind = kind

    def read(self) -> list[Any]:
        """Return the names of the attributes, and then their values."""
        names = [name for name in vars(self._kind) if not name.startswith("__")]
        return [*names, *[vars(self._kind)[name] for name in names]]

    def write(self, content: list[Any]) -> None:
        """Set the attributes that differ, and delete new ones."""
        middle = len(content) // 2
        attributes = dict(zip(content[:middle], content[middle:], strict=True))
        now = self.read()
        for name in now[: len(now) // 2]:
            if name not in attributes:
                type.__delattr__(self._kind, name)
        for name, value in attributes.items():
            if name not in vars(self._kind) or vars(self._kind)[name] is not value:
                type.__setattr__(self._kind, name, value)


_Holder = _Items | _Slots | _Class
