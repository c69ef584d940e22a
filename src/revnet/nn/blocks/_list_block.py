"""The base of blocks with a list of residual functions, one for each stream."""

import abc

from torch import nn

from revnet._units import counted
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine import HalfBlock
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock, check_coupling, check_functions, reads
from revnet.nn.blocks._split_dim import choose_split_dim

_ADDITIVE = Additive()


class AbstractListBlock(AbstractReversibleBlock):
    """Update several streams in turn, each by its own residual function.

    Args:
        functions: The residual functions, two or more.
        split_dim: The dimension along which a tensor input is split into streams.
        coupling: How the residuals are combined with the streams.
    """

    def __init__(self, *functions: nn.Module, split_dim: int | None = None, coupling: AbstractCoupling = _ADDITIVE):
        super().__init__()
        check_functions(**{f"functions[{index}]": function for index, function in enumerate(functions)})
        check_coupling(coupling)
        if len(functions) < 2:
            raise ValueError(
                f"`functions` (={len(functions)} of them) must be two or more, one for each stream; use "
                "`CouplingLayer` for a block of one function."
            )
        self.functions = nn.ModuleList(functions)
        self.num_streams = len(functions)
        self.split_dim, self.has_default_split_dim = choose_split_dim(split_dim)
        self.coupling = coupling

    @staticmethod
    @abc.abstractmethod
    def _source(index: int, num_streams: int) -> int | tuple[int, ...]:
        """Return the stream that a function reads, or the streams of which it reads the sum."""

    @reads("coupling", list_name="functions")
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the residual functions in order. `prefix`, such as "blocks.3.", names the block in errors."""
        if len(self.functions) != self.num_streams:
            raise ValueError(
                f"`{prefix}functions` has {counted(len(self.functions), 'entry', 'entries')}, but its block has "
                f"{counted(self.num_streams, 'stream')}, one for each function; build a new block from the functions."
            )
        return [
            HalfBlock(
                function,
                index,
                type(self)._source(index, self.num_streams),
                f"{prefix}functions.{index}",
                self.coupling,
                f"functions.{index}",
            )
            for index, function in enumerate(self.functions)
        ]

    def extra_repr(self) -> str:
        """Return the options that differ from the default, for `repr`."""
        options = [] if self.has_default_split_dim else [f"split_dim={self.split_dim}"]
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
