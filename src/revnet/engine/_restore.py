"""Putting tensors into the places where modules hold them, and taking them out again."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class TensorPlace(NamedTuple):
    """The place where a module holds one of its tensors, and the tensor that it held during a call."""

    holder: dict[str, Any]
    """The module's `_parameters` or `_buffers`."""
    name: str
    """The name in the holder."""
    tensor: Tensor
    """The tensor that was there."""

    @property
    def current(self) -> Any:
        """The tensor that is there now."""
        return self.holder.get(self.name)

    def swap(self, tensor: Tensor) -> Callable[[], None]:
        """Put `tensor` there, and return a function that undoes it."""
        before = self.holder[self.name]
        self.holder[self.name] = tensor

        def undo() -> None:
            self.holder[self.name] = before

        return undo
