"""What is done with activations between the forward and the backward pass: keep them, or compute them again.

A policy is an object, not a flag: it says what it costs in memory, time and accuracy. The units of one model, such as
the blocks of a sequence, may have different ones. From the least memory to the most: `Reverse`, `Checkpoint`, `Store`;
`Offload` pays in transfers instead.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from revnet._types import Streams
from revnet.engine import (
    BoundChain,
    checkpointed,
    checkpointed_call,
    offloaded,
    offloaded_call,
    reversible,
    stored,
)


class AbstractPolicy(abc.ABC):
    """Runs consecutive half-blocks, and decides what the backward pass will find.

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
    """A policy for any module too, reversible or not.

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
    """Rebuild the activations in the backward pass: memory that does not grow with depth. The default.

    Memory: the final streams of consecutive blocks, and the activations of one residual function at a time.
    Time: one more forward pass of each residual function, in theory a third more per step.
    Accuracy: the output is exact; gradients carry the rounding of the rebuilt streams, which grows with depth.

    Example:
        >>> from torch import nn
        >>> from revnet import Reverse, ReversibleBlock, ReversibleSequential
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
        >>> ReversibleSequential(*blocks).policies
        (Reverse(), Reverse())
    """

    run = staticmethod(reversible)


@dataclass(frozen=True)
class Checkpoint(AbstractModulePolicy):
    """Keep what each function reads, and compute again what is inside it.

    Memory: one stream for each residual function, two for a block; of any other module, its arguments. The activations
    of one function at a time.
    Time: one more forward pass of each function, up to the last tensor that autograd saves. Of two convolutions, the
    second is not computed again, so that it costs about half of what `Reverse` does.
    Accuracy: that of `Store`, bit for bit where functions are deterministic. Also the way to stop the rounding of
    `Reverse` from growing, if every so many blocks have it.

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
        """Run the half-blocks, keeping the stream that each of them reads."""
        return checkpointed(chain, streams)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `module`, keeping its arguments."""
        return checkpointed_call(module, args, kwargs)


@dataclass(frozen=True)
class Offload(AbstractModulePolicy):
    """Keep the activations, but in host memory: copied there in the forward pass, and back in the backward pass.

    Memory: none of the device between the passes, all of `Store` on the host, pinned. On a CPU it is `Store`.
    Time: no recomputation, but two transfers of each activation; what that takes depends on the bus.
    Accuracy: plain autograd's, bit for bit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import Offload, PolicySequential
        >>> head = PolicySequential(nn.Linear(8, 3), policy=Offload())
        >>> head(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the half-blocks by ordinary autograd, with what it saves on the host."""
        return offloaded(chain, streams)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `module` by ordinary autograd, with what it saves on the host."""
        return offloaded_call(module, args, kwargs)


@dataclass(frozen=True)
class Store(AbstractModulePolicy):
    """Keep the activations, as ordinary autograd does: the stored twin.

    Memory: all activations of all blocks. Time: no recomputation. Accuracy: plain autograd's.

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
