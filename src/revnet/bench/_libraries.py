"""Other libraries' ways to run reversible blocks. Each library is imported when it is used."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from revnet.bench.cases import FunctionPair


class _Sequence(nn.Module):
    """Modules that run one after the other, each with the same keyword arguments."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.steps = nn.ModuleList(modules)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for module in self.steps:
            x = module(x, **kwargs)
        return x


def make_memcnn(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    """Return the blocks in memcnn's wrapper."""
    memcnn = import_module("memcnn")
    couplings = [memcnn.AdditiveCoupling(f, g, split_dim=split_dim) for f, g in functions]
    return _Sequence([memcnn.InvertibleModuleWrapper(coupling, preserve_rng_state=True) for coupling in couplings])


def make_revtorch(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    """Return the blocks in revtorch's sequence."""
    revtorch = import_module("revtorch.revtorch")
    blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=split_dim, fix_random_seed=True) for f, g in functions]
    return revtorch.ReversibleSequence(nn.ModuleList(blocks))


def make_revlib(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    """Return the functions in revlib's sequence."""
    halves = [function for pair in functions for function in pair]
    return import_module("revlib").ReversibleSequential(*halves, split_dim=split_dim)


class Reformer(nn.Module):
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
