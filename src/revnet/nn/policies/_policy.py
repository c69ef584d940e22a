"""Policies: whether activations are kept for the backward pass or computed again.

The units of a model, such as the blocks of a sequence, may have different policies. `Reverse` needs the least memory,
then `Checkpoint`, then `Store`. `Offload` pays with transfers instead of recomputation.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from revnet._checks import check_bool, describe
from revnet._types import Streams
from revnet.engine import BoundChain, HalfBlock, checkpointed, offloaded, reversible, stored
from revnet.engine._checkpoint import checkpointed_call
from revnet.engine._moves import Moves
from revnet.engine._offload import offloaded_call
from revnet.nn.policies._keep_spec import Keep, check_keep, roles_in, rule_of


class AbstractPolicy(abc.ABC):
    """The interface of policies. A policy runs consecutive half-blocks and decides what to keep for the backward pass.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential
        >>> class Announce(AbstractPolicy):
        ...     def run(self, chain, streams):
        ...         print("running a chain")
        ...         return Reverse().run(chain, streams)
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> y = ReversibleSequential(block, policy=Announce())(torch.ones(1, 4))
        running a chain
    """

    @abc.abstractmethod
    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the half-blocks of `chain` on the streams, and return the streams after them."""


class AbstractModulePolicy(AbstractPolicy):
    """The interface of policies that can also run modules that are not reversible.

    Example:
        >>> from revnet import Checkpoint, Reverse
        >>> from revnet.nn import AbstractModulePolicy
        >>> [isinstance(p, AbstractModulePolicy) for p in (Checkpoint(), Reverse())]
        [True, False]
    """

    @abc.abstractmethod
    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `module(*args, **kwargs)`."""


@dataclass(frozen=True)
class Reverse(AbstractPolicy):
    """Rebuild the activations in the backward pass, so that memory does not grow with depth. This is the default.

    Two arguments spend memory to save time. Neighboring blocks may differ in them: they still form one chain. The
    functions of a block are named by their roles, "f" and "g" in a `ReversibleBlock`. `revnet.memory.plan` chooses both
    for a budget.

    Memory: the final streams of consecutive blocks, and the activations of one residual function at a time. On a CPU,
    two numbers for each channel of a batch norm. For each name in `hold`, one stream for each block. For `keep`, the
    outputs of the operators.
    Time: one more forward pass of each residual function, in theory a third more per step. A stream that is held saves
    the last operator of the function that updates it. The operators in `keep` are not run again.
    Accuracy: the output is exact. Gradients carry the rounding of the rebuilt streams, which grows with depth. Streams
    that are held are exact, and stop it from growing.

    Args:
        hold: Names of the residual functions whose input stream is held instead of rebuilt, such as "f" or
            ("f", "g"). True stands for all of them.
        keep: Outputs inside the residual functions that are kept instead of computed again. Either names of operators:
            "convolution", "linear" (matrix products) and "attention", with the name of a residual function before and
            the number of a call after it if wanted, as in ("f.attention", "g.linear.0"). Or operators, such as
            `torch.ops.aten.mm`. Or a number of bytes for each row of blocks, such as "64MiB", for these three kinds in
            the order in which they run. Or a function as in
            `torch.utils.checkpoint.create_selective_checkpoint_contexts`. Outputs of operators that draw random
            numbers, outputs that are written to, and outputs inside compiled code are never kept.

    In a model that `torch.compile` traces as a whole, both arguments have no effect.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `keep` has an unknown name, or `hold` or `keep` names a function that a block does not have.

    Example:
        >>> from torch import nn
        >>> from revnet import Reverse, ReversibleBlock, ReversibleSequential
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
        >>> ReversibleSequential(*blocks).policies
        (Reverse(), Reverse())
        >>> ReversibleSequential(*blocks, policy=Reverse(hold="f", keep="g.linear")).policies[0]
        Reverse(hold=('f',), keep=('g.linear',))
    """

    hold: bool | str | Sequence[str] = ()
    keep: Keep = ()
    # A method would be one more call in each step.
    run = staticmethod(reversible)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hold", _check_hold(self.hold))
        object.__setattr__(self, "keep", check_keep(self.keep))
        if self.hold or self.keep != ():
            object.__setattr__(self, "run", self._run_keeping)

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name in ("hold", "keep") if (value := getattr(self, name)) != ()]
        return f"Reverse({', '.join(given)})"

    def _run_keeping(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run a chain that another policy or a module has built, and keep what the arguments ask for."""
        if chain.chain.moves is None and not torch.compiler.is_dynamo_compiling():
            chain.chain.moves = self._moves_for(chain.half_blocks)
        return reversible(chain, streams)

    def moves_for(self, half_blocks: Sequence[HalfBlock]) -> tuple[Moves | None, ...]:
        """Return what is kept for each half-block of one block.

        Raises:
            ValueError: The policy names a residual function that the block does not have.
        """
        # A graph of the whole model keeps nothing, and the rules cannot be traced.
        if (not self.hold and self.keep == ()) or torch.compiler.is_dynamo_compiling():
            return (None,) * len(half_blocks)
        roles = {half_block.role for half_block in half_blocks}
        held = set[str]() if self.hold is True else {*self.hold}  # type: ignore[misc]
        for argument, named in (("hold", held), ("keep", roles_in(self.keep))):
            if named - roles:
                raise ValueError(
                    f"`{argument}` of {self} names the residual function {min(named - roles)!r}, but the block "
                    f"of `{half_blocks[0].name}` has {', '.join(map(repr, sorted(roles)))}."
                )
        return self._moves_for(half_blocks)

    def holds(self, role: str) -> bool:
        """Return whether the input streams of the functions of a role are held."""
        return self.hold is True or role in self.hold  # type: ignore[operator]

    def _moves_for(self, half_blocks: Sequence[HalfBlock]) -> tuple[Moves | None, ...]:
        roles = {half_block.role for half_block in half_blocks}
        of_role = {role: Moves(self.holds(role), rule_of(self.keep, role)) for role in roles}
        return tuple([None if (moves := of_role[half_block.role]) == Moves() else moves for half_block in half_blocks])


def _check_hold(hold: Any) -> Literal[True] | tuple[str, ...]:
    if isinstance(hold, bool):
        return True if hold else ()
    names = hold.split(",") if isinstance(hold, str) else hold
    is_sequence = isinstance(names, Sequence | set | frozenset)
    if not is_sequence or not all(isinstance(name, str) and name.strip() for name in names):
        raise TypeError(
            f"`hold` (={describe(hold)}) must hold names of residual functions, such as 'f' or ('f', 'g'); in Python, "
            "True stands for all of them."
        )
    return tuple(dict.fromkeys([name.strip() for name in names]))


@dataclass(frozen=True)
class Checkpoint(AbstractModulePolicy):
    """Keep the input of each function, and compute the activations inside the function again.

    Memory: one stream for each residual function, two for a block, and the arguments of any other module. In addition,
    the activations of one function at a time.
    Time: one more forward pass of each function, up to the last tensor that autograd saves. The second of two
    convolutions is not computed again, so this costs about half as much as `Reverse`.
    Accuracy: the same as `Store`, to the last bit if the functions are deterministic. Some `Checkpoint` blocks in a
    long `Reverse` sequence stop its rounding from growing.

    References:
        Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import Checkpoint, PolicySequential
        >>> stem = PolicySequential(nn.Linear(3, 8), nn.GELU(), policy=Checkpoint())
        >>> stem(torch.ones(2, 3)).shape
        torch.Size([2, 8])
    """

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the half-blocks, and keep the stream that each of them reads."""
        return checkpointed(chain, streams)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `module`, and keep its arguments."""
        return checkpointed_call(module, args, kwargs)


@dataclass(frozen=True)
class Offload(AbstractModulePolicy):
    """Keep the activations in host memory. They are copied back to the device in the backward pass.

    Memory: on the device, none between the passes. On the host, as much pinned memory as `Store` needs on the device.
    On a CPU, the same as `Store`.
    Time: no recomputation, but two transfers of each activation, whose speed depends on the bus.
    Accuracy: the same as plain autograd, to the last bit.

    Args:
        overlap: Whether a GPU computes during the transfers, which then take up to 128 MiB of its memory. The backward
            pass fetches activations before it needs them. Experimental: written, not run on a GPU.

    Raises:
        TypeError: `overlap` is not a bool.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import Offload, PolicySequential
        >>> head = PolicySequential(nn.Linear(8, 3), policy=Offload())
        >>> head(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """

    overlap: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_bool(overlap=self.overlap)

    def __repr__(self) -> str:
        return "Offload(overlap=True)" if self.overlap else "Offload()"

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the half-blocks by ordinary autograd, and keep its saved tensors on the host."""
        return offloaded(chain, streams, overlaps=self.overlap)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `module` by ordinary autograd, and keep its saved tensors on the host."""
        return offloaded_call(module, args, kwargs, overlaps=self.overlap)


@dataclass(frozen=True)
class Store(AbstractModulePolicy):
    """Keep the activations, as ordinary autograd does. A model with this policy is a stored twin.

    Memory: all activations of all blocks.
    Time: no recomputation.
    Accuracy: the same as plain autograd.

    Example:
        >>> from torch import nn
        >>> from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
        >>> ReversibleSequential(*blocks, policy=[Store(), Reverse()]).policies
        (Store(), Reverse())
    """

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the half-blocks by ordinary autograd."""
        return stored(chain, streams)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `module` by ordinary autograd."""
        return module(*args, **kwargs)
