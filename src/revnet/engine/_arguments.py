"""The arguments of a call, from which each replay gets new containers and new leaves.

A function may change a list or a dict, or register a hook on a tensor, each time it runs. Only the first run may do
this to what the caller passed. No tensor is kept with its node, which may lead back to the slots (rule 1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from revnet._torch_internals import tree_flatten, tree_unflatten


class _Place(NamedTuple):
    """Stands for a tensor among the arguments."""

    number: int


class Arguments:
    """Positional and keyword arguments, kept for replays."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._structure: Any = None
        leaves: Sequence[Any] = args
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):  # Otherwise, flattening would find nothing.
            leaves, self._structure = tree_flatten((args, kwargs))
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        self._tensors = list(tensors.values())
        self.kept = [tensor.detach() for tensor in self._tensors]
        """The tensors without their nodes. A detached tensor shares its version, which shows writes."""
        self._requires_grad = [tensor.requires_grad for tensor in self._tensors]
        numbers = {identity: number for number, identity in enumerate(tensors)}
        self._leaves = [_Place(numbers[id(leaf)]) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._own: dict[int, Tensor] = {}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that were passed, and those that they are views of, until `close` is called."""
        return (*self._tensors, *[tensor._base for tensor in self._tensors if tensor._base is not None])

    def note(self, lasting: set[int]) -> None:
        """Note which tensors are parameters or buffers of a function, or views of them.

        A replay recognizes these by their identity, which is in `lasting`, so they are not replaced.
        """
        for number, tensor in enumerate(self._tensors):
            if id(tensor) in lasting or id(tensor._base) in lasting:
                self._own[number] = tensor

    def close(self) -> None:
        """Forget the tensors that were passed."""
        self._tensors = []

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a replay. A tensor that was passed twice is one tensor again."""
        # `data` has its own version counter, which is 0; otherwise every saved input would look modified.
        new = [
            self._own[number] if number in self._own else tensor.data.requires_grad_(requires_grad)
            for number, (tensor, requires_grad) in enumerate(zip(self.kept, self._requires_grad, strict=True))
        ]
        leaves = [new[leaf.number] if type(leaf) is _Place else leaf for leaf in self._leaves]
        return (tuple(leaves), {}) if self._structure is None else tree_unflatten(leaves, self._structure)
