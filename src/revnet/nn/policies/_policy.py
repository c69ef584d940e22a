"""Policies: whether activations are kept for the backward pass or computed again.

The units of a model, such as the blocks of a sequence, may have different policies. `Reverse` needs the least memory,
then `Checkpoint`, then `Store`. `Offload` pays with transfers instead of recomputation.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from revnet._checks import check_bool
from revnet._types import Streams
from revnet.engine import BoundChain, checkpointed, offloaded, reversible, stored
from revnet.engine._checkpoint import checkpointed_call
from revnet.engine._offload import offloaded_call


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

    Memory: the final streams of consecutive blocks, and the activations of one residual function at a time.
    Time: one more forward pass of each residual function, in theory a third more per step.
    Accuracy: the output is exact. Gradients carry the rounding of the rebuilt streams, which grows with depth.

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
