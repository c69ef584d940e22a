"""The variants that `frontier.py` compares: policies of this library, checkpoints of PyTorch, and other libraries."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.bench._torch_methods import Checkpointed
from revnet.bench.cases import CASES, Case, FunctionPair
from revnet.bench.methods import METHODS, Method
from revnet.models.resnet import BottleneckResidual
from revnet.nn import AbstractPolicy

Operators = frozenset[Any]
Calls = tuple[tuple[str, int], ...]
"""Calls of operators: the name of the operators, and the number of the call in the region, from 0 up."""

WORKLOADS: Mapping[str, Case] = {
    **{case.name: case for case in CASES},
    "bottleneck": Case(
        "bottleneck",
        "F = G = BN-ReLU-conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1; streams of 128 channels, 32 within the function, "
        "32x32 pixels, batch 8 (4 MiB each)",
        lambda: (BottleneckResidual(128, 128), BottleneckResidual(128, 128)),
        (8, 128, 32, 32),
        split_dim=1,
    ),
}

_aten = torch.ops.aten
_OPERATORS: Mapping[str, Operators] = {
    "convolution": frozenset([_aten.convolution.default]),
    "linear": frozenset([_aten.addmm.default, _aten.mm.default]),
    "attention": frozenset([_aten._scaled_dot_product_flash_attention_for_cpu.default]),
}


# This library ---------------------------------------------------------------------------------------------------------


def mixed(policy: AbstractPolicy, others: AbstractPolicy, share: float, depth: int) -> list[AbstractPolicy]:
    """Return a policy for each block: `policy` for a share of the blocks, evenly spread, and `others` for the rest."""
    return [policy if int((index + 1) * share) > int(index * share) else others for index in range(depth)]


def revnet(name: str, policy: AbstractPolicy, others: AbstractPolicy | None = None, share: float = 1.0) -> Method:
    """Return a variant of this library, whose blocks have one or two policies."""

    def make(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
        policies = mixed(policy, others or policy, share, len(functions))
        blocks = [ReversibleBlock(f, g, split_dim=split_dim) for f, g in functions]
        return ReversibleSequential(*blocks, policy=policies)

    text = f"`{policy}`"
    if others is not None:
        text += f" for {share:.3g} of the blocks, `{others}` for the others"
    return Method(name, text, make)


STORED = revnet("Store()", Store())
"""The stored twin, to which all others are compared."""


def _hold_all(keep: Any = ()) -> Reverse:
    return Reverse(hold=("f", "g"), keep=keep)


_CONV = (
    revnet("Reverse()", Reverse()),
    revnet("hold f, quarter", Reverse(hold="f"), Reverse(), 0.25),
    revnet("keep c1, half", Reverse(keep="convolution.0"), Reverse(), 0.5),
    revnet("hold f", Reverse(hold="f")),
    revnet("keep c1", Reverse(keep="convolution.0")),
    revnet("hold f, g", _hold_all()),
    revnet("keep c1, r", Reverse(keep="convolution")),
    revnet("hold f, g + c1, half", _hold_all("convolution.0"), _hold_all(), 0.5),
    revnet("hold f, g + c1", _hold_all("convolution.0")),
    revnet("Store(), quarter", Store(), _hold_all("convolution.0"), 0.25),
    revnet("Store(), half", Store(), _hold_all("convolution.0"), 0.5),
    revnet("Checkpoint()", Checkpoint()),
)
_ATTENTION, _QKV, _OUT, _HIDDEN, _LAST = "f.attention", "f.linear.0", "f.linear.1", "g.linear.0", "g.linear.1"
_TRANSFORMER = (
    revnet("Reverse()", Reverse()),
    revnet("hold f, quarter", Reverse(hold="f"), Reverse(), 0.25),
    revnet("hold f", Reverse(hold="f")),
    revnet("hold f + sdpa", Reverse(hold="f", keep=_ATTENTION)),
    revnet("hold f, g", _hold_all()),
    revnet("hold f, g + sdpa", _hold_all(_ATTENTION)),
    revnet("hold f, g + sdpa, l1 in 1/4", _hold_all((_ATTENTION, _HIDDEN)), _hold_all(_ATTENTION), 0.25),
    revnet("hold f, g + sdpa, qkv", _hold_all((_ATTENTION, _QKV))),
    revnet(
        "hold f, g + sdpa, qkv, l1 in 1/4", _hold_all((_ATTENTION, _QKV, _HIDDEN)), _hold_all((_ATTENTION, _QKV)), 0.25
    ),
    revnet("hold f, g + sdpa, qkv, l1", _hold_all((_ATTENTION, _QKV, _HIDDEN))),
    revnet("keep o, l2, sdpa", Reverse(keep=(_ATTENTION, _OUT, _LAST))),
    revnet("keep o, l2, sdpa, qkv", Reverse(keep=(_ATTENTION, _QKV, _OUT, _LAST))),
    revnet("keep all", Reverse(keep=("attention", "linear"))),
    revnet("Checkpoint()", Checkpoint()),
)
_BOTTLENECK = (
    revnet("Reverse()", Reverse()),
    revnet("keep c1, c2", Reverse(keep=("convolution.0", "convolution.1"))),
    revnet("hold f, g", _hold_all()),
    revnet("hold f, g + c1, c2", _hold_all(("convolution.0", "convolution.1"))),
    revnet("Store(), half", Store(), _hold_all(("convolution.0", "convolution.1")), 0.5),
    revnet("Checkpoint()", Checkpoint()),
)


# PyTorch --------------------------------------------------------------------------------------------------------------


class CheckpointedFunctions(nn.Module):
    """Reversible blocks in a plain loop, with PyTorch's checkpoint around each residual function.

    Args:
        functions: Residual functions of all blocks.
        split_dim: Dimension along which the streams are concatenated.
        calls: Calls in F whose outputs are kept.
        calls_in_g: Calls in G whose outputs are kept.
    """

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int, calls: Calls = (), calls_in_g: Calls = ()):
        super().__init__()
        self.halves = nn.ModuleList([function for pair in functions for function in pair])
        self.split_dim = split_dim
        self.options = [options_of(calls), options_of(calls_in_g)] * len(functions)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        x1, x2 = (half.clone() for half in x.chunk(2, self.split_dim))  # contiguous, as in this library
        for function, options in zip(self.halves, self.options, strict=True):
            x1, x2 = x2, x1 + checkpoint(function, x2, use_reentrant=False, **options)
        return torch.cat((x1, x2), self.split_dim)


class SelectiveBlocks(Checkpointed):
    """Blocks in a plain loop, each under PyTorch's checkpoint, which keeps the outputs of certain calls."""

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int, calls: Calls):
        super().__init__(functions, 1, split_dim, store_last=False)
        self.options = options_of(calls)


def options_of(calls: Calls) -> dict[str, Any]:
    """Return the arguments of PyTorch's checkpoint with which it keeps the outputs of certain calls."""
    return {"context_fn": partial(_contexts, calls)} if calls else {}


def _contexts(calls: Calls) -> Any:
    numbers = {True: Counter[str](), False: Counter[str]()}  # one for each pass through the region

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        for name, operators in _OPERATORS.items():
            if operator in operators:
                number = numbers[context.is_recompute][name]
                numbers[context.is_recompute][name] += 1
                return CheckpointPolicy.MUST_SAVE if (name, number) in calls else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _checkpoint(region: str, make: Callable[[Sequence[FunctionPair], int], nn.Module]) -> Method:
    return Method(f"checkpoint / {region}", f"`torch.utils.checkpoint(use_reentrant=False)`, region: {region}", make)


def _in_blocks(name: str, *calls: tuple[str, int]) -> Method:
    text = f"the same for each block, with `create_selective_checkpoint_contexts`, keeping {_names_of(calls)}"
    return Method(f"selective / block, {name}", text, partial(SelectiveBlocks, calls=calls))


def _in_functions(name: str, calls: Calls, calls_in_g: Calls) -> Method:
    kept = f"{_names_of(calls)} in F and {_names_of(calls_in_g) or 'nothing'} in G"
    text = f"the same for each function, with `create_selective_checkpoint_contexts`, keeping {kept}"
    make = partial(CheckpointedFunctions, calls=calls, calls_in_g=calls_in_g)
    return Method(f"selective / function, {name}", text, make)


def _names_of(calls: Calls) -> str:
    return ", ".join(f"{operators} {number}" for operators, number in calls)


_CHECKPOINTS = (
    _checkpoint("block", lambda f, dim: Checkpointed(f, 1, dim, store_last=False)),
    _checkpoint("2 blocks", lambda f, dim: Checkpointed(f, 2, dim, store_last=False)),
    _checkpoint("function", CheckpointedFunctions),
)
# Numbers count the calls in the region: in a block, the second function goes on where the first one ends.
_C = [("convolution", number) for number in range(6)]
_L = [("linear", number) for number in range(4)]
_A = ("attention", 0)
_SELECTIVE = {
    "conv": (
        _in_blocks("r of F", _C[1]),
        _in_blocks("c1, c1", _C[0], _C[2]),
        _in_blocks("all", *_C[:4]),
        _in_functions("c1", (_C[0],), (_C[0],)),
    ),
    "transformer": (
        _in_blocks("sdpa, o", _A, _L[1]),
        _in_blocks("sdpa, qkv, o, l1", _A, *_L[:3]),
        _in_functions("sdpa", (_A,), ()),
        _in_functions("sdpa, qkv", (_A, _L[0]), ()),
        _in_functions("sdpa, qkv, l1", (_A, _L[0]), (_L[0],)),
    ),
    "bottleneck": (
        _in_blocks("c1, c2, c1, c2", _C[0], _C[1], _C[3], _C[4]),
        _in_functions("c1, c2", (_C[0], _C[1]), (_C[0], _C[1])),
    ),
}

# All ------------------------------------------------------------------------------------------------------------------

OWN: Mapping[str, Sequence[Method]] = {"conv": _CONV, "transformer": _TRANSFORMER, "bottleneck": _BOTTLENECK}
"""Variants of this library, by workload."""
PYTORCH: Mapping[str, Sequence[Method]] = {name: (*_CHECKPOINTS, *rest) for name, rest in _SELECTIVE.items()}
"""Checkpoints of PyTorch, by workload."""
PEERS: Sequence[Method] = tuple([method for method in METHODS if method.package])
"""Other reversible libraries."""
