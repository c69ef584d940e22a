"""Rows of converted blocks, and the place of a block in its row."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from revnet.conversion._bodies import Branch, WholeBlock, Wrapping, untaken_arguments
from revnet.conversion._methods import AbstractMethod
from revnet.conversion._scheme import Factors, Scheme
from revnet.engine import Chain, HalfBlock
from revnet.nn import AbstractPolicy

_UNKNOWN = nn.Identity()
"""Function of a half-block whose block has not been called yet."""


class Row:
    """Converted blocks whose host calls one after the other, with one method.

    Args:
        names: Names of the blocks, in order.
        method: The method.
        num_branches: Number of branches of each block; None if blocks are whole.
    """

    def __init__(self, names: tuple[str, ...], method: AbstractMethod, num_branches: int | None):
        self.names = names
        self.num_branches = num_branches
        self._chains: dict[tuple[int, int], Chain] = {}
        self.method = method

    @property
    def is_whole(self) -> bool:
        """Whether each block is one function, which includes its skip connection."""
        return self.num_branches is None

    @property
    def method(self) -> AbstractMethod:
        """The method. Passes that have begun keep the scheme of the one before."""
        return self._method

    @method.setter
    def method(self, method: AbstractMethod) -> None:
        scheme = method.scheme(self.num_branches)
        self.scheme: Scheme | None = scheme if isinstance(scheme, Scheme) else None
        self.factors: Factors | None = None if isinstance(scheme, Scheme) else scheme
        self._method = method
        # A schedule changes the method before each update. What was learned about the functions remains.
        self._chains = {
            key: self._build(*key, self.scheme, chain) for key, chain in self._chains.items() if self.scheme
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the chains, which hold what one process has learned."""
        return {**vars(self), "_chains": {}}

    def chain_of(self, start: int, stop: int, scheme: Scheme) -> Chain:
        """Return the chain of blocks `start` to `stop`, whose functions are filled in by `fill`."""
        if scheme != self.scheme:  # A pass that began before the method was changed.
            return self._build(start, stop, scheme)
        if (start, stop) not in self._chains:
            self._chains[start, stop] = self._build(start, stop, scheme)
        return self._chains[start, stop]

    def _build(self, start: int, stop: int, scheme: Scheme, like: Chain | None = None) -> Chain:
        numbers = range(start * scheme.num_functions, stop * scheme.num_functions)
        if like is None or len(like.half_blocks) != len(numbers):
            return Chain([self._half_block(_UNKNOWN, number, scheme) for number in numbers])
        functions = [half_block.function for half_block in like.half_blocks]
        chain = Chain([self._half_block(*pair, scheme) for pair in zip(functions, numbers, strict=True)])
        chain.plans, chain.num_runs, chain.tolerated = like.plans, like.num_runs, like.tolerated
        return chain

    def _half_block(self, function: nn.Module, number: int, scheme: Scheme) -> HalfBlock:
        index, of_block = divmod(number, scheme.num_functions)
        name = self.names[index] + (f".{'fgh'[of_block]}" if scheme.num_functions > 1 else "")
        target, is_adapter = scheme.target_of(number), scheme.adapter is not None and of_block == 1
        coupling = scheme.coupling_of(number)
        return HalfBlock(function, target, 1 - target, name, coupling, str(index), takes_arguments=not is_adapter)

    def half_blocks_of(self, place: "Place") -> tuple[HalfBlock, ...]:
        """Return the half-blocks of a block with the current method; none at `a = 0`."""
        scheme = self.scheme
        if scheme is None:
            return ()
        place.renew_branches()
        first = place.index * scheme.num_functions
        functions = enumerate(place.functions_of(scheme), first)
        return tuple([self._half_block(function, number, scheme) for number, function in functions])

    def fill(self, chain: Chain, start: int, place: "Place", scheme: Scheme) -> None:
        """Put the functions of a block into a chain that begins at block `start`."""
        first = (place.index - start) * scheme.num_functions
        training = place.block.training
        for offset, function in enumerate(place.functions_of(scheme)):
            if function.training is not training:
                function.training = training
            if chain.half_blocks[first + offset].function is not function:
                number = place.index * scheme.num_functions + offset
                half_blocks = list(chain.half_blocks)
                half_blocks[first + offset] = self._half_block(function, number, scheme)
                chain.half_blocks = tuple(half_blocks)
                chain.plans[first + offset] = None


@dataclass(eq=False)
class Place:
    """The place of a converted block in its row, and the functions that it runs."""

    row: Row
    index: int
    """Index of the block in the row."""
    block: nn.Module
    whole: WholeBlock
    """The computation of the original block."""
    branches: tuple[Branch, ...] | None
    """The branches of the block; None if blocks are whole."""
    policy: AbstractPolicy
    """Policy of the block."""
    outside: tuple[nn.Module, ...] = field(init=False)
    """The block, and its modules that are not part of a branch; empty if blocks are whole."""
    untaken: dict[str, int] = field(init=False)
    """Arguments of the block that reach no branch: the index of each after the stream, by name."""
    checked: dict[tuple[Any, ...], Wrapping] = field(init=False)
    """What the block returns around its tensor, for each kind of call in which the branches compute the same."""

    def __post_init__(self) -> None:
        self._compare_names()

    def _compare_names(self) -> None:
        """Find out what of the block is not in its branches."""
        branches = self.branches or ()
        inside = {id(module) for branch in branches for module in branch.modules()}
        modules = self.block.modules() if branches else ()
        self.outside = tuple([module for module in modules if id(module) not in inside])
        self.untaken = untaken_arguments(type(self.block), branches) if branches else {}
        self.checked = {}

    @property
    def name(self) -> str:
        """Name of the block."""
        return self.row.names[self.index]

    def renew_branches(self) -> None:
        """Take the modules that the block has now, which may have been replaced, as by an adapter around a module."""
        if self.branches is not None and not all(branch.is_current(self.block) for branch in self.branches):
            self.branches = tuple(
                [branch if branch.is_current(self.block) else branch.renewed(self.block) for branch in self.branches]
            )
            self._compare_names()

    def functions_of(self, scheme: Scheme) -> tuple[nn.Module, ...]:
        """Return the functions that the block runs, the same objects in each call."""
        if scheme.adapter is not None:
            return self.whole, self.block.get_submodule(scheme.adapter)
        if self.branches is not None:
            return self.branches
        return (self.whole,)
