"""The interface of reversible blocks. Forward pass, inverse and log-determinant all follow from the half-blocks."""

import abc
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from revnet._checks import describe
from revnet._torch_release import allow_default_coupling
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine import Chain, HalfBlock
from revnet.nn.blocks._blocks_in_runs import BlockInRun
from revnet.nn.blocks._reversible_module import Reads, ReversibleModule
from revnet.nn.blocks._run import Segment
from revnet.nn.blocks._schedule import ModuleCache, Schedule
from revnet.nn.policies._policy import Reverse

_REVERSE = Reverse()

_HalfBlocks = Callable[..., list[HalfBlock]]

_SPLIT = ("split_dim", "num_streams", "has_default_split_dim")

READS: dict[_HalfBlocks, Reads] = {}
"""For each `half_blocks` method of this library, the data that it reads from its block."""


class AbstractReversibleBlock(ReversibleModule):
    """A module whose input can be computed from its output, as a chain of half-blocks.

    A subclass defines the residual functions of the block and the stream that each of them updates. A block that is
    called alone keeps its output and rebuilds the rest in the backward pass. Put several blocks in a row into a
    `ReversibleSequential`, which keeps only the last output.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.engine import HalfBlock
        >>> from revnet.nn import AbstractReversibleBlock
        >>> class SharedBlock(AbstractReversibleBlock):
        ...     def __init__(self, f):
        ...         super().__init__()
        ...         self.f = f
        ...         self.split_dim = 1
        ...     def half_blocks(self, prefix=""):
        ...         first = HalfBlock(self.f, 0, 1, prefix + "f (first)")
        ...         return [first, HalfBlock(self.f, 1, 0, prefix + "f (second)")]
        >>> block, x = SharedBlock(nn.Linear(2, 2)), torch.rand(3, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    split_dim: int
    """Dimension along which a tensor input is split into streams."""
    has_default_split_dim: bool = False
    """Whether `split_dim` was left out when the block was built, so that it is 1."""
    num_streams: int = 2
    """Number of streams."""

    @abc.abstractmethod
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the residual functions in order. `prefix`, such as "blocks.3.", names the block in errors."""

    def blocks_in_run(self) -> list[BlockInRun]:
        """Return the block itself, which runs alone where it is called outside of a sequence."""
        half_blocks = self.half_blocks()
        return [BlockInRun("", self, _REVERSE, half_blocks, self, num_streams=self.num_streams, has_policy=False)]

    def _build_schedule(self) -> Schedule:
        if torch.compiler.is_dynamo_compiling():  # A trace cannot compare with what eager code cached.
            allow_default_coupling(Additive)
            return schedule_of([(_REVERSE, _chain_of(self.half_blocks()))], self)
        cache = self.__dict__.setdefault("_single_chain", _SingleChain())
        return schedule_of([(_REVERSE, cache.chain_of(self.half_blocks()))], self)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the residual functions with the arguments of `torch.compile`. The block itself is not compiled.

        A sequence calls the functions of its blocks and not the blocks, so it would never call a compiled block.
        """
        for half_block in self.half_blocks():
            compile_in_place(half_block.function, *args, **kwargs)


def compile_in_place(function: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Compile a function in place, as `nn.Module.compile` does."""
    if type(function).forward.__module__.startswith("torch.nn."):
        # PyTorch compiles no code of its own, so `nn.Sequential(...).compile()` has no effect. It does compile a call
        # of such code.
        function._compiled_call_impl = torch.compile(partial(_call, function), *args, **kwargs)
    else:
        function.compile(*args, **kwargs)


def _call(function: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return function._call_impl(*args, **kwargs)


class _SingleChain(ModuleCache):
    """The chain of a block that is called outside of a sequence."""

    def __init__(self) -> None:
        self._known: tuple[list[HalfBlock], Chain] | None = None

    def chain_of(self, half_blocks: list[HalfBlock]) -> Chain:
        """Return a chain of these half-blocks, the cached one if they are the same as in the last call."""
        known = self._known
        if known is None or known[0] != half_blocks:
            self._known = known = (half_blocks, _chain_of(half_blocks))
        return known[1]


def _chain_of(half_blocks: list[HalfBlock]) -> Chain:
    for half_block in half_blocks:
        check_couplings(half_blocks[0], half_block)
    return Chain(half_blocks)


def check_couplings(first: HalfBlock, other: HalfBlock) -> None:
    """Raise if one chain has exact couplings of another grid, or exact and other couplings."""
    if (other.coupling.is_exact or first.coupling.is_exact) and other.coupling.grid != first.coupling.grid:
        raise ValueError(
            f"`{other.name}` has the coupling {other.coupling}, but `{first.name}` has {first.coupling}; an exact "
            "coupling keeps the streams on its grid, so give all functions of a block or sequence the same one with "
            "`set_coupling`."
        )


def schedule_of(segments: Sequence[Segment], first: AbstractReversibleBlock | None) -> Schedule:
    """Return the schedule of blocks. `first` is the first block, or None if there are no blocks."""
    if first is None:
        return Schedule(segments, 1, 2, None)
    is_ambiguous = first.has_default_split_dim and first.split_dim == 1
    return Schedule(segments, first.split_dim, first.num_streams, type(first) if is_ambiguous else None)


def reads(
    *attributes: str, children: tuple[str, ...] = (), list_name: str | None = None
) -> Callable[[_HalfBlocks], _HalfBlocks]:
    """Declare the data that a `half_blocks` method reads from its block.

    The method then runs only when these data have changed. Without this declaration it runs in every step. A method
    that overrides it does not inherit the declaration.

    Args:
        attributes: Names of the attributes that are not modules.
        children: Names of the residual functions.
        list_name: Name of a `ModuleList` of residual functions.
    """

    def register(method: _HalfBlocks) -> _HalfBlocks:
        READS[method] = attrgetter(*_SPLIT, *attributes), children, list_name
        return method

    return register


def check_functions(**functions: nn.Module) -> None:
    """Raise unless each residual function is a module."""
    for name, function in functions.items():
        if not isinstance(function, nn.Module):
            raise TypeError(
                f"`{name}` (={describe(function)}) must be an nn.Module, since the backward pass needs its parameters "
                "and buffers to run it again; wrap the function in a module."
            )


def check_coupling(coupling: object) -> None:
    """Raise unless `coupling` is a coupling."""
    if not isinstance(coupling, AbstractCoupling):
        raise TypeError(
            f"`coupling` (={describe(coupling)}) must be a coupling, such as `Additive()`, `FixedPoint()` or "
            "`Affine()`."
        )
