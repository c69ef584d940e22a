"""The ways of running reversible blocks that are compared. A new one is one entry in `CONTENDERS`.

Each makes, from the very same residual functions, a module that takes and gives both streams joined in one tensor.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet._types import TensorPair
from revnet.bench.cases import FunctionPair
from revnet.nn import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, Store


@dataclass(frozen=True)
class Contender:
    """A way of running reversible blocks."""

    name: str
    description: str
    """With which settings, for the report."""
    make: Callable[[Sequence[FunctionPair], int], nn.Module]
    """From the residual functions and the dimension along which the streams are joined, a module of one tensor."""
    package: str | None = None
    """The peer's name on PyPI, where it is one."""
    split_dim: int | None = None
    """The only dimension along which it can split, where it has no choice."""
    max_depth: int | None = None
    """Blocks beyond which it is not run."""

    def missing(self) -> str | None:
        """Why it cannot run, with the command that mends it; None if it can."""
        if self.package is None or self.version() is not None:
            return None
        return f"not installed: pip install --no-deps {self.package}"

    def version(self) -> str | None:
        """The installed version of the peer; None where there is none."""
        try:
            return metadata.version(self.package or "")
        except (metadata.PackageNotFoundError, ValueError):
            return None


class Group(nn.Module):
    """Reversible blocks as anyone would write them, for the checkpoint to wrap."""

    def __init__(self, functions: Sequence[FunctionPair]):
        super().__init__()
        self.fs = nn.ModuleList([f for f, _ in functions])
        self.gs = nn.ModuleList([g for _, g in functions])

    def forward(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> TensorPair:
        """Run the blocks."""
        for f, g in zip(self.fs, self.gs, strict=True):
            x1 = x1 + f(x2, **kwargs)
            x2 = x2 + g(x1, **kwargs)
        return x1, x2


class Checkpointed(nn.Module):
    """Groups of blocks, each under PyTorch's non-reentrant checkpoint.

    Args:
        functions: The residual functions of all blocks.
        group_size: Blocks that are recomputed together.
        split_dim: The dimension along which the streams are joined.
        store_last: Whether to store the last group, which is the first one that the backward pass needs.
    """

    def __init__(self, functions: Sequence[FunctionPair], group_size: int, split_dim: int, *, store_last: bool):
        super().__init__()
        starts = range(0, len(functions), group_size)
        self.groups = nn.ModuleList([Group(functions[start : start + group_size]) for start in starts])
        self.split_dim = split_dim
        self.num_checkpointed = len(starts) - store_last

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        x1, x2 = (half.clone() for half in x.chunk(2, self.split_dim))  # dense, as this library's own split makes them
        for index, group in enumerate(self.groups):
            if index < self.num_checkpointed:
                x1, x2 = checkpoint(group, x1, x2, use_reentrant=False, **kwargs)
            else:
                x1, x2 = group(x1, x2, **kwargs)
        return torch.cat((x1, x2), self.split_dim)


class CheckpointedHalves(nn.Module):
    """Recursive checkpointing: the first half of a row under PyTorch's non-reentrant checkpoint, and each half so too.

    Memory: one pair of streams for each halving. Time: a forward pass of half the row more for each halving.

    Args:
        functions: The residual functions of all blocks.
        split_dim: The dimension along which the streams are joined.
    """

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList([Group([pair]) for pair in functions])
        self.split_dim = split_dim

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        x1, x2 = (half.clone() for half in x.chunk(2, self.split_dim))  # dense, as this library's own split makes them
        return torch.cat(self._run(0, len(self.blocks), x1, x2, **kwargs), self.split_dim)

    def _run(self, start: int, stop: int, x1: Tensor, x2: Tensor, **kwargs: Any) -> TensorPair:
        if stop - start == 1:
            return self.blocks[start](x1, x2, **kwargs)
        middle = (start + stop) // 2
        x1, x2 = checkpoint(self._run, start, middle, x1, x2, use_reentrant=False, **kwargs)
        return self._run(middle, stop, x1, x2, **kwargs)


def _under(policy: AbstractPolicy) -> Callable[[Sequence[FunctionPair], int], nn.Module]:
    """A sequence of this library under `policy`."""

    def make(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
        return ReversibleSequential(*[ReversibleBlock(f, g, split_dim=split_dim) for f, g in functions], policy=policy)

    return make


def _last_stored(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    blocks = [ReversibleBlock(f, g, split_dim=split_dim) for f, g in functions]
    return ReversibleSequential(*blocks, policy=[Reverse()] * (len(blocks) - 1) + [Store()])


def _checkpoint_each(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    return Checkpointed(functions, 1, split_dim, store_last=False)


def _checkpoint_sqrt(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    return Checkpointed(functions, isqrt(len(functions)), split_dim, store_last=True)


class _Row(nn.Module):
    """Modules in a row, each with the same keyword arguments."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.row = nn.ModuleList(modules)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for module in self.row:
            x = module(x, **kwargs)
        return x


def _memcnn(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    memcnn = import_module("memcnn")
    couplings = [memcnn.AdditiveCoupling(f, g, split_dim=split_dim) for f, g in functions]
    return _Row([memcnn.InvertibleModuleWrapper(coupling, preserve_rng_state=True) for coupling in couplings])


def _revtorch(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    revtorch = import_module("revtorch.revtorch")
    blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=split_dim, fix_random_seed=True) for f, g in functions]
    return revtorch.ReversibleSequence(nn.ModuleList(blocks))


def _revlib(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    halves = [function for pair in functions for function in pair]
    return import_module("revlib").ReversibleSequential(*halves, split_dim=split_dim)


class _Reformer(nn.Module):
    """Routes keyword arguments to both functions, as the other contenders do."""

    def __init__(self, functions: Sequence[FunctionPair]):
        super().__init__()
        self.sequence = _reformer_module().ReversibleSequence(nn.ModuleList([nn.ModuleList(fg) for fg in functions]))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.sequence(x, arg_route=(True, True), **kwargs)


def _reformer_module() -> Any:
    """`reformer_pytorch.reversible` alone: the package around it imports four more, none of which this file needs."""
    name = "reformer_pytorch.reversible"
    if name not in sys.modules:
        package = importlib.util.find_spec("reformer_pytorch")
        assert package is not None
        assert package.submodule_search_locations is not None
        (folder,) = package.submodule_search_locations
        spec = importlib.util.spec_from_file_location(name, f"{folder}/reversible.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module  # where torch.compile looks for it
    return sys.modules[name]


PLAIN = Contender(
    "plain", "`ReversibleSequential(..., policy=Store())`: ordinary autograd", _under(Store()), max_depth=64
)
"""What all others are compared with."""

CONTENDERS: Sequence[Contender] = (
    PLAIN,
    Contender("checkpoint", "`torch.utils.checkpoint(use_reentrant=False)` of each block", _checkpoint_each),
    Contender(
        "checkpoint sqrt",
        "the same of each group of sqrt(depth) blocks; the last group stored, as `checkpoint_sequential` does",
        _checkpoint_sqrt,
    ),
    Contender(
        "checkpoint recursive",
        "the same of the first half of the blocks, and within each half again, down to single blocks",
        CheckpointedHalves,
    ),
    Contender("revnet", "`ReversibleSequential(..., policy=Reverse())`, the default", _under(Reverse())),
    Contender("revnet, last stored", "the same, but `Store()` for the last block", _last_stored),
    Contender(
        "memcnn", "`InvertibleModuleWrapper(preserve_rng_state=True)` of each block", _memcnn, "memcnn", max_depth=64
    ),
    Contender(
        "revtorch",
        "`ReversibleSequence` of blocks with `fix_random_seed=True`",
        _revtorch,
        "revtorch",
        max_depth=64,
    ),
    Contender("revlib", "`ReversibleSequential`, its default mode", _revlib, "revlib", max_depth=64),
    Contender(
        "reformer-pytorch",
        "`ReversibleSequence`, which splits along dimension 2 only: its streams are joined there",
        lambda functions, _: _Reformer(functions),
        "reformer-pytorch",
        split_dim=2,
        max_depth=64,
    ),
)
