"""Rows of converted blocks, and the place of a block in its row."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from revnet.conversion._methods import AbstractMethod, coupling_of
from revnet.coupling import AbstractCoupling
from revnet.engine import Chain, HalfBlock
from revnet.nn import AbstractPolicy


class Row:
    """Converted blocks whose host calls one after the other, with one method.

    Args:
        names: Names of the blocks, in order.
        method: The method.
        functions_per_block: Number of residual functions of each block: 1 for whole blocks.
    """

    def __init__(self, names: tuple[str, ...], method: AbstractMethod, functions_per_block: int):
        self.names = names
        self.functions_per_block = functions_per_block
        self._chains: dict[int, Chain] = {}
        self.method = method

    @property
    def is_whole(self) -> bool:
        """Whether each block is one function, which includes its skip connection."""
        return self.functions_per_block == 1

    @property
    def method(self) -> AbstractMethod:
        """The method. Passes that have begun keep the coupling of the one before."""
        return self._method

    @method.setter
    def method(self, method: AbstractMethod) -> None:
        self._method = method
        self.coupling = coupling_of(method, is_whole=self.is_whole)
        self._chains = {}

    def coupling_for(self, training: bool) -> AbstractCoupling | None:
        """Return the coupling of the pass that begins now; None at `a = 0`."""
        return self.coupling

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the chains, which hold what one process has learned."""
        return {**vars(self), "_chains": {}}

    def chain_from(self, position: int, coupling: AbstractCoupling) -> Chain:
        """Return the chain of the blocks from `position` on, whose functions are filled in by `fill`."""
        if coupling != self.coupling:  # A pass that began before the method was changed.
            return self._build(position, coupling)
        if position not in self._chains:
            self._chains[position] = self._build(position, coupling)
        return self._chains[position]

    def _build(self, position: int, coupling: AbstractCoupling) -> Chain:
        per_block = self.functions_per_block
        half_blocks = [
            self._half_block(nn.Identity(), number, coupling)
            for number in range(position * per_block, len(self.names) * per_block)
        ]
        return Chain(half_blocks)

    def _half_block(self, function: nn.Module, number: int, coupling: AbstractCoupling) -> HalfBlock:
        """Return half-block `number` of the row. Each reads the stream that was updated last."""
        index, of_block = divmod(number, self.functions_per_block)
        name = self.names[index] + ("" if self.is_whole else f".{'fgh'[of_block]}")
        return HalfBlock(function, number % 2, 1 - number % 2, name, coupling, str(index))

    def fill(self, chain: Chain, start: int, place: "Place") -> None:
        """Put the functions of a block into a chain that begins at block `start`."""
        first = (place.index - start) * self.functions_per_block
        for offset, function in enumerate(place.functions):
            if chain.half_blocks[first + offset].function is not function:
                number = place.index * self.functions_per_block + offset
                coupling = chain.half_blocks[first + offset].coupling
                half_blocks = list(chain.half_blocks)
                half_blocks[first + offset] = self._half_block(function, number, coupling)
                chain.half_blocks = tuple(half_blocks)
                chain.plans[first + offset] = None


@dataclass(eq=False)
class Place:
    """The place of a converted block in its row, and the functions that it runs."""

    row: Row
    index: int
    """Index of the block in the row."""
    block: nn.Module
    functions: tuple[Any, ...]
    """The functions of the block: one `WholeBlock`, or the branches."""
    whole: Any
    """The computation of the original block, a `WholeBlock`."""
    policy: AbstractPolicy
    """Policy of the block."""
    is_checked: bool
    """Whether the branches are known to compute what the block computes."""

    @property
    def name(self) -> str:
        """Name of the block."""
        return self.row.names[self.index]
