"""The methods that the benchmark compares for running reversible blocks. To add one, add an entry to `METHODS`.

Each method builds a module from the same residual functions. The module takes and returns both streams, concatenated
into one tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from math import isqrt

from torch import nn

from revnet.bench import _libraries
from revnet.bench._torch_methods import Checkpointed, CheckpointedHalves, Compiled, SavedOnCpu, Selective
from revnet.bench.cases import FunctionPair
from revnet.nn import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, Store

_NOT_INSTALLED = "not installed"
_BUDGET = 0.1


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
    is_compiled: bool = False
    """Whether the method compiles its code, which takes minutes and allocates where only a profiler sees it."""

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
    Method(
        "selective checkpoint",
        "a checkpoint for each block with `create_selective_checkpoint_contexts`, which keeps the outputs of "
        "convolutions, matrix products and attention",
        Selective,
    ),
    Method("save_on_cpu", "plain autograd under `torch.autograd.graph.save_on_cpu`", SavedOnCpu, max_depth=64),
    Method(
        "compile, budget",
        f"`torch.compile(fullgraph=True)` with `activation_memory_budget = {_BUDGET}`; its bytes are the ones that "
        "PyTorch's profiler reports, which include memory inside kernels",
        partial(Compiled, budget=_BUDGET),
        max_depth=16,
        is_compiled=True,
    ),
    Method("revnet", "`ReversibleSequential(..., policy=Reverse())`, the default", _with_policy(Reverse())),
    Method("revnet, last stored", "the same, with `Store()` for the last block", _last_stored),
    Method(
        "revnet, hold",
        '`Reverse(hold=("f", "g"))`, which holds the stream that each function reads',
        _with_policy(Reverse(hold=("f", "g"))),
    ),
    Method(
        "revnet, hold and keep",
        "the same, and `keep` for the outputs of convolutions, matrix products and attention",
        _with_policy(Reverse(hold=("f", "g"), keep=("convolution", "linear", "attention"))),
    ),
    Method(
        "memcnn",
        "`InvertibleModuleWrapper(preserve_rng_state=True)` for each block",
        _libraries.make_memcnn,
        "memcnn",
        max_depth=64,
    ),
    Method(
        "revtorch",
        "`ReversibleSequence` of blocks with `fix_random_seed=True`",
        _libraries.make_revtorch,
        "revtorch",
        max_depth=64,
    ),
    Method("revlib", "`ReversibleSequential`, its default mode", _libraries.make_revlib, "revlib", max_depth=64),
    Method(
        "reformer-pytorch",
        "`ReversibleSequence`, which splits along dimension 2 only, so its streams are concatenated there",
        lambda functions, _: _libraries.Reformer(functions),
        "reformer-pytorch",
        split_dim=2,
        max_depth=64,
    ),
)
