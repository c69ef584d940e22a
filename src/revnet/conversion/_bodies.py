"""The functions of a converted block: the original block as a whole, or its branches, without its hooks."""

from typing import Any

from torch import Tensor, nn


class WholeBlock(nn.Module):
    """The computation of the original block, as one function that takes and returns a tensor.

    Args:
        block: The converted block.
        kind: Its original class.
        name: Its name, for error messages.
    """

    def __init__(self, block: nn.Module, kind: type[nn.Module], name: str):
        super().__init__()
        self.block = block
        self.name = name
        self._kind = kind
        self.kind_of_output: type | None = None
        """The class of a tuple or list that the block returns around its tensor."""
        self.rest: tuple[Any, ...] = ()
        """What follows the tensor in that tuple; only None."""

    def _get_name(self) -> str:
        """Return the name of the block for error messages."""
        return self.name

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block, and return the tensor in its output.

        Raises:
            TypeError: The block returns more than one tensor.
            ValueError: A second run would change an argument again, or the block changes the shape.
        """
        output = self._kind.forward(self.block, x, *args, **kwargs)
        y = self._only_tensor(output)
        if y.shape != x.shape:
            raise ValueError(
                f"`{self.name}` changes the shape of its stream from {tuple(x.shape)} to {tuple(y.shape)}, so the two "
                "streams cannot be combined; convert the blocks before and after it in two calls."
            )
        return y

    def _only_tensor(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            self.kind_of_output, self.rest = None, ()
            return output
        is_plain = type(output) in (tuple, list) and output and isinstance(output[0], Tensor)
        if not is_plain or any(value is not None for value in output[1:]):
            inside = f" of {len(output)} values" if isinstance(output, tuple | list) else ""
            raise TypeError(
                f"`{self.name}` returned a {type(output).__name__}{inside} and not a single tensor, so the rest would "
                "be lost when its stream is rebuilt; turn off what the block returns in addition (such as caches or "
                "attention weights), or convert other blocks."
            )
        self.kind_of_output, self.rest = type(output), tuple(output[1:])
        first: Tensor = output[0]
        return first

    def wrap(self, y: Tensor) -> Any:
        """Return `y` as the block returns it: alone, or in a tuple."""
        return y if self.kind_of_output is None else self.kind_of_output((y, *self.rest))
