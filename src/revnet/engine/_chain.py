"""The chain of half-blocks that the engine runs, which is built once, and one call of it.

A `Chain` holds everything that stays the same from call to call: the residual functions in order, how each of them
updates its stream, and what the engine has learned about them (see `Plan`). A `BoundChain` adds the state of one call:
the arguments, and the options of the caller. Policies and entry points take a bound chain and the streams, and return
the streams.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from revnet._types import Streams
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine._arguments import Arguments
from revnet.engine._block_hooks import run_through_blocks
from revnet.engine._sums import SummingList, read_source
from revnet.engine._tensors import tensors_in

if TYPE_CHECKING:
    from revnet.engine._moves import Holding, Moves
    from revnet.engine._plan import Plan
    from revnet.engine._rebuild import LinearStep, Rebuilder
    from revnet.engine._recording import ChainRecorder
    from revnet.engine._surroundings import Surroundings
    from revnet.engine._tolerance import ToleranceKeeper

_ADDITIVE = Additive()

Advance = Callable[[int, list[Tensor]], None]
"""Function that runs the half-block of an index on a list of streams, and puts the new stream into the list."""


class HalfBlock(NamedTuple):
    """One residual function, the stream that it reads, and the stream that it updates.

    A reversible block consists of two half-blocks. `y1 = x1 + f(x2)` reads stream 1 and updates stream 0. Then
    `y2 = x2 + g(y1)` reads stream 0 and updates stream 1. A function may also read the sum of several streams.
    """

    function: nn.Module
    target: int
    """Index of the stream that it updates."""
    source: Any
    """Index of the stream that it reads, or a tuple of indices of the streams whose sum it reads."""
    name: str = "f"
    """Place of the function in the model, for error messages: "blocks.3.f"."""
    coupling: AbstractCoupling = _ADDITIVE
    """Coupling that combines the residual with the stream."""
    role: str = "f"
    """Name of the function in its block, "f" or "g"; `f_kwargs` and `g_kwargs` use it."""
    takes_arguments: bool = True
    """Whether the function receives the caller's additional arguments."""

    @property
    def sources(self) -> tuple[int, ...]:
        """Indices of the streams that it reads."""
        return self.source if isinstance(self.source, tuple) else (self.source,)


class Chain:
    """Half-blocks in order, with what the engine learns about them.

    Args:
        half_blocks: The half-blocks in the order in which they run.
        blocks: For each half-block, the block that must be called for it because it has hooks or a `forward` of its
            own; None for other half-blocks. Consecutive half-blocks of one block are run by a single call of the
            block.
        moves: For each half-block, what a reversible run keeps for it; None or empty for nothing.
    """

    __slots__ = (
        *("blocks", "half_blocks", "has_exact", "is_exact", "list_streams", "mixes", "moves", "num_runs", "plans"),
        *("may_draw", "tolerated"),
    )

    def __init__(
        self,
        half_blocks: Sequence[HalfBlock],
        blocks: Sequence[nn.Module | None] | None = None,
        moves: "Sequence[Moves | None]" = (),
    ):
        self.half_blocks = tuple(half_blocks)
        self.blocks = None if blocks is None or not any(block is not None for block in blocks) else tuple(blocks)
        self.moves = tuple(moves) if any(move is not None for move in moves) else None
        self.is_exact = all(half_block.coupling.is_exact for half_block in half_blocks)
        """Whether all couplings are exact, so that reversal has no error."""
        self.has_exact = any(half_block.coupling.is_exact for half_block in half_blocks)
        """Whether any coupling is exact."""
        self.mixes = any(half_block.coupling.mixes for half_block in half_blocks)
        """Whether any coupling changes the output of its function; see `AbstractCoupling.mix`."""
        couplings = [half_block.coupling for half_block in half_blocks]
        self.may_draw = self.blocks is not None or any(
            coupling.draws or not coupling.is_linear for coupling in couplings
        )
        """Whether anything but the functions may draw random numbers: couplings, or hooks of blocks."""
        has_sums = any(type(half_block.source) is tuple for half_block in half_blocks)
        self.list_streams: type[list[Tensor]] = SummingList if has_sums else list
        """Type of the list of streams in a reversible run."""
        self.plans: list[Plan | None] = [None] * len(self.half_blocks)
        """Structure of each function in the mode of its last call."""
        self.num_runs = 0
        """Number of reversible runs so far."""
        self.tolerated: dict[int, float] = {}
        """Deviations of results that were checked and found to be rounding; see `AgreementWatch`."""

    def bind(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        own_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "BoundChain":
        """Return one call of the chain.

        Args:
            args: Additional positional arguments of every residual function.
            kwargs: Keyword arguments of every residual function.
            own_kwargs: Keyword arguments for the functions of one role, by role: `{"f": {"mask": mask}}`.
        """
        for_all = dict(kwargs or {})
        own = {role: dict(of_role) for role, of_role in (own_kwargs or {}).items()}
        return BoundChain(self, args, for_all, own, is_plain=not (args or for_all or own or self.mixes))

    def prepare(
        self, half_block: HalfBlock, streams: Sequence[Tensor], surroundings: "Surroundings | None" = None
    ) -> HalfBlock:
        """Return a half-block for a call that is about to run it, with the coupling that this call uses.

        Args:
            half_block: The half-block, of a chain that `may_draw`.
            streams: The streams before it.
            surroundings: State of a run, which is updated; None if nothing will run again.
        """
        coupling = half_block.coupling
        if coupling.draws:
            drawn = coupling.drawn(streams[half_block.target], training=half_block.function.training)
            half_block = half_block._replace(coupling=drawn)
        if surroundings is not None:
            surroundings.refresh()  # Hooks and couplings may have drawn, and hooks may have switched autocast.
        return half_block

    def groups(self) -> Iterator[tuple[nn.Module | None, range]]:
        """Yield the blocks that must be called, with the indices of their half-blocks; None for no block."""
        start = 0
        for index in range(1, len(self.half_blocks) + 1):
            if index == len(self.half_blocks) or self._block(index) is not self._block(start):
                yield self._block(start), range(start, index)
                start = index

    def _block(self, index: int) -> nn.Module | None:
        return None if self.blocks is None else self.blocks[index]


@dataclass(slots=True, eq=False)
class BoundChain:
    """One call of a chain: its arguments, and the options of the caller."""

    chain: Chain
    """The chain that is called."""
    args: tuple[Any, ...]
    """Additional positional arguments of every residual function."""
    kwargs: dict[str, Any]
    """Keyword arguments of every residual function."""
    own_kwargs: dict[str, dict[str, Any]]
    """Keyword arguments for the functions of one role, by role."""
    input_dtype: torch.dtype | None = None
    """Dtype in which functions read a stream, if it differs from the dtype of the stream."""
    log_dets: list[Tensor] | None = None
    """List that receives the log-determinants, if the caller wants them: one sum (B,), or empty for zero."""
    tolerance: "ToleranceKeeper | None" = None
    """Keeper of the bound on the error of rebuilt streams, if the caller wants a bound."""
    is_plain: bool = False
    """Whether `call` is known to be `half_block.function(source)`: no arguments, `input_dtype` or `mix`."""
    is_joined: bool = False
    """Whether the caller concatenates the final streams with `joined`, which then hands them to the run."""
    holding: "Holding | None" = None
    """Streams and outputs that the call holds in addition to the final streams."""
    # Weak: the graph owns the run (rule 1).
    run: "weakref.ref[Rebuilder] | None" = None
    """The run that holds the final streams for the backward pass, if there is one."""
    replayed: Arguments | None = None
    """The arguments, in a call for replays, which get new leaves and containers each time."""
    recorder: "ChainRecorder | None" = None
    """Runs the chain if its activations are rebuilt from streams that come from outside; see `record`."""
    way_out: ClassVar[str | None] = None
    """What a user can do about drift, if it is not what helps the blocks of a sequence."""

    def for_replays(self) -> "BoundChain":
        """Return the same call for replays: with arguments of its own, and without the caller's log-determinants."""
        given = (self.args, self.kwargs, self.own_kwargs)
        replayed = Arguments(given, {}) if any(given) else None
        # `log_dets` holds tensors whose nodes lead back to the run (rule 1).
        return BoundChain(self.chain, (), {}, {}, self.input_dtype, is_plain=self.is_plain, replayed=replayed)

    def part(self, start: int, stop: int) -> "BoundChain":
        """Return the call of some of the half-blocks, without the blocks that they belong to."""
        moves = self.chain.moves
        chain = Chain(self.half_blocks[start:stop], None, () if moves is None else moves[start:stop])
        return BoundChain(
            chain,
            self.args,
            self.kwargs,
            self.own_kwargs,
            self.input_dtype,
            self.log_dets,
            is_plain=self.is_plain,
        )

    @property
    def half_blocks(self) -> tuple[HalfBlock, ...]:
        """The half-blocks, in order."""
        return self.chain.half_blocks

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the arguments, at any depth."""
        return tensors_in(self.args, self.kwargs, self.own_kwargs)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors in the arguments of a call for replays, and those that they are views of, in the first run."""
        return () if self.replayed is None else self.replayed.inputs

    def arguments_of(self, half_block: HalfBlock) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the additional arguments of one residual function."""
        if not half_block.takes_arguments:
            return (), {}
        given = (self.args, self.kwargs, self.own_kwargs)
        args, kwargs, own_kwargs = given if self.replayed is None else self.replayed.again()[0]
        own = own_kwargs.get(half_block.role) if own_kwargs else None
        return args, {**kwargs, **own} if own else kwargs

    def call(self, half_block: HalfBlock, source: Tensor) -> Tensor:
        """Call a residual function, and raise if it overwrites its input, which could not be rebuilt."""
        stream = source
        if self.input_dtype is not None:
            source = source.to(self.input_dtype)
        args, kwargs = self.arguments_of(half_block)
        has_version = not (torch.compiler.is_dynamo_compiling() or source.is_inference())
        version = source._version if has_version else 0
        residual: Tensor = half_block.function(source, *args, **kwargs)
        if has_version and source._version != version:
            raise wrote_to_input(half_block)
        return half_block.coupling.mix(stream, residual, half_block.name) if self.chain.mixes else residual

    def join(
        self,
        half_block: HalfBlock,
        x: Tensor,
        residual: Tensor,
        log_dets: list[Tensor] | None = None,
        step: "LinearStep | None" = None,
    ) -> Tensor:
        """Return the stream combined with a residual, and add its log-determinant to `log_dets`.

        Args:
            half_block: The half-block.
            x: The stream.
            residual: The result of the function.
            log_dets: List that receives the log-determinant, if the caller wants it.
            step: Step that will be undone, and receives what the inverse needs of the stream.
        """
        coupling = half_block.coupling
        if step is not None and coupling.remembers:
            y, step.kept_of_stream = coupling.forward_keeping(x, residual, half_block.name)
        else:
            y = coupling.forward(x, residual, half_block.name)
        if log_dets is not None and not coupling.is_additive:
            log_det = coupling.log_det(x, residual)
            if log_det is not None:
                log_dets[:] = [sum(log_dets, start=log_det)]  # One sum, so that nothing grows with depth.
        return y


def wrote_to_input(half_block: HalfBlock) -> RuntimeError:
    """Return the error for a function that overwrites its input."""
    return RuntimeError(
        f"`{half_block.name}` modified its input in place, which a reversible block cannot undo; use the out-of-place "
        "form of its first operation (`inplace=False`), or `clone` the input."
    )


def stored(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Run the half-blocks with ordinary autograd, which stores every activation. This is the twin of `reversible`.

    It computes the same numbers with memory that grows with depth, and recomputes nothing.

    Args:
        chain: The half-blocks in order, with the arguments of their functions.
        streams: The streams, two or more. Not modified.

    Returns:
        The streams after the last half-block.

    Raises:
        TypeError: A residual function did not return a tensor, or returned a dtype that the stream cannot hold.
        ValueError: The shape of a residual differs from the shape of the stream that it updates.
        RuntimeError: A residual function modified its input in place.
    """

    def advance(index: int, streams: list[Tensor]) -> None:
        half_block = chain.half_blocks[index]
        if chain.chain.may_draw:
            half_block = chain.chain.prepare(half_block, streams)
        residual = chain.call(half_block, read_source(streams, half_block.source))
        streams[half_block.target] = chain.join(half_block, streams[half_block.target], residual, chain.log_dets)

    return run_half_blocks(chain, list(streams), advance)


def run_half_blocks(chain: BoundChain, streams: list[Tensor], advance: Advance) -> Streams:
    """Run the half-blocks in order with `advance`, and call the blocks that must be called.

    Args:
        chain: The chain.
        streams: The streams; each call of `advance` puts a new one into this list.
        advance: Runs one half-block, given its index and the streams.
    """
    if chain.chain.blocks is None:
        for index in range(len(chain.half_blocks)):
            advance(index, streams)
    else:
        run_through_blocks(chain, streams, advance)
    return tuple(streams)
