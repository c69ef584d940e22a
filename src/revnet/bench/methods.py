"""The methods that the benchmark compares for running reversible blocks. To add one, add an entry to `METHODS`.

Each method builds a module from the same residual functions. The module takes and returns both streams, concatenated
into one tensor.
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

_NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Method:
    """A way to run reversible blocks: a policy of this library, a checkpoint, or another library."""

    name: str
    description: str
    """Settings of the method, for the report."""
    make: Callable[[Sequence[FunctionPair], int], nn.Module]
    """Function that builds the module from the residual functions and the dimension of concatenation."""
    package: str | None = None
    """Name on PyPI, if the method is another library."""
    split_dim: int | None = None
    """Dimension along which the method splits, if it supports only one."""
    max_depth: int | None = None
    """Largest number of blocks to run, if the method is limited."""

    def missing(self) -> str | None:
        """Return why the method cannot run and how to install it, or None if it can run."""
        if self.package is None or self.version() is not None:
            return None
        return f"{_NOT_INSTALLED}: pip install --no-deps {self.package}"

    def version(self) -> str | None:
        """Return the installed version of the library, or None if it is not installed."""
        try:
            return metadata.version(self.package or "")
        except (metadata.PackageNotFoundError, ValueError):
            return None


def is_missing(note: str) -> bool:
    """Return whether `note` says that a library is not installed."""
    return note.startswith(_NOT_INSTALLED)


def report_missing(methods: Sequence[Method], say: Callable[[str], None]) -> None:
    """Pass one line to `say` with the libraries that are not installed, if there are any."""
    packages = [method.package for method in methods if method.package and method.missing()]
    if packages:
        say(f"{_NOT_INSTALLED}: {', '.join(packages)}; to include them: pip install --no-deps {' '.join(packages)}")


class Group(nn.Module):
    """Reversible blocks in a plain loop, which a checkpoint can wrap."""

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
        functions: Residual functions of all blocks.
        group_size: Number of blocks that are recomputed together.
        split_dim: Dimension along which the streams are concatenated.
        store_last: Whether to store the last group, which the backward pass needs first.
    """

    def __init__(self, functions: Sequence[FunctionPair], group_size: int, split_dim: int, *, store_last: bool):
        super().__init__()
        starts = range(0, len(functions), group_size)
        self.groups = nn.ModuleList([Group(functions[start : start + group_size]) for start in starts])
        self.split_dim = split_dim
        self.num_checkpointed = len(starts) - store_last

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        x1, x2 = (half.clone() for half in x.chunk(2, self.split_dim))  # contiguous, as in this library
        for index, group in enumerate(self.groups):
            if index < self.num_checkpointed:
                x1, x2 = checkpoint(group, x1, x2, use_reentrant=False, **kwargs)
            else:
                x1, x2 = group(x1, x2, **kwargs)
        return torch.cat((x1, x2), self.split_dim)


class CheckpointedHalves(nn.Module):
    """Recursive checkpointing: the first half of the blocks runs under a checkpoint, and each half is split again.

    Memory: one pair of streams per level of recursion. Time: one more forward pass of half the blocks per level.

    Args:
        functions: Residual functions of all blocks.
        split_dim: Dimension along which the streams are concatenated.
    """

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList([Group([pair]) for pair in functions])
        self.split_dim = split_dim

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        x1, x2 = (half.clone() for half in x.chunk(2, self.split_dim))  # contiguous, as in this library
        return torch.cat(self._run(0, len(self.blocks), x1, x2, **kwargs), self.split_dim)

    def _run(self, start: int, stop: int, x1: Tensor, x2: Tensor, **kwargs: Any) -> TensorPair:
        if stop - start == 1:
            return self.blocks[start](x1, x2, **kwargs)
        middle = (start + stop) // 2
        x1, x2 = checkpoint(self._run, start, middle, x1, x2, use_reentrant=False, **kwargs)
        return self._run(middle, stop, x1, x2, **kwargs)


def _with_policy(policy: AbstractPolicy) -> Callable[[Sequence[FunctionPair], int], nn.Module]:
    """Return a function that builds a sequence of this library with `policy`."""

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


class _Sequence(nn.Module):
    """Modules that run one after the other, each with the same keyword arguments."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.steps = nn.ModuleList(modules)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for module in self.steps:
            x = module(x, **kwargs)
        return x


def _memcnn(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    memcnn = import_module("memcnn")
    couplings = [memcnn.AdditiveCoupling(f, g, split_dim=split_dim) for f, g in functions]
    return _Sequence([memcnn.InvertibleModuleWrapper(coupling, preserve_rng_state=True) for coupling in couplings])


def _revtorch(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    revtorch = import_module("revtorch.revtorch")
    blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=split_dim, fix_random_seed=True) for f, g in functions]
    return revtorch.ReversibleSequence(nn.ModuleList(blocks))


def _revlib(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    halves = [function for pair in functions for function in pair]
    return import_module("revlib").ReversibleSequential(*halves, split_dim=split_dim)


class _Reformer(nn.Module):
    """Reformer blocks that pass keyword arguments to both functions, like the other methods."""

    def __init__(self, functions: Sequence[FunctionPair]):
        super().__init__()
        self.sequence = _reformer_module().ReversibleSequence(nn.ModuleList([nn.ModuleList(fg) for fg in functions]))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.sequence(x, arg_route=(True, True), **kwargs)


def _reformer_module() -> Any:
    """Import only the module `reformer_pytorch.reversible`, without the four packages that its package imports."""
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


PLAIN = Method(
    "plain", "`ReversibleSequential(..., policy=Store())`: ordinary autograd", _with_policy(Store()), max_depth=64
)
"""Plain autograd, the baseline of the comparison."""

METHODS: Sequence[Method] = (
    PLAIN,
    Method("checkpoint", "`torch.utils.checkpoint(use_reentrant=False)` for each block", _checkpoint_each),
    Method(
        "checkpoint sqrt",
        "the same for each group of sqrt(depth) blocks; the last group is stored, as in `checkpoint_sequential`",
        _checkpoint_sqrt,
    ),
    Method(
        "checkpoint recursive",
        "the same for the first half of the blocks, and again within each half, down to single blocks",
        CheckpointedHalves,
    ),
    Method("revnet", "`ReversibleSequential(..., policy=Reverse())`, the default", _with_policy(Reverse())),
    Method("revnet, last stored", "the same, with `Store()` for the last block", _last_stored),
    Method(
        "memcnn", "`InvertibleModuleWrapper(preserve_rng_state=True)` for each block", _memcnn, "memcnn", max_depth=64
    ),
    Method(
        "revtorch",
        "`ReversibleSequence` of blocks with `fix_random_seed=True`",
        _revtorch,
        "revtorch",
        max_depth=64,
    ),
    Method("revlib", "`ReversibleSequential`, its default mode", _revlib, "revlib", max_depth=64),
    Method(
        "reformer-pytorch",
        "`ReversibleSequence`, which splits along dimension 2 only, so its streams are concatenated there",
        lambda functions, _: _Reformer(functions),
        "reformer-pytorch",
        split_dim=2,
        max_depth=64,
    ),
)
