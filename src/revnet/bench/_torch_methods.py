"""PyTorch's own ways to run reversible blocks: a plain loop, checkpoints, offloading, and a compiled loop."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from revnet._types import TensorPair
from revnet.bench.cases import FunctionPair

_aten = torch.ops.aten
_EXPENSIVE = [
    *(_aten.convolution.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


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
        self.options: dict[str, Any] = {}  # further arguments of the checkpoint
        starts = range(0, len(functions), group_size)
        self.groups = nn.ModuleList([Group(functions[start : start + group_size]) for start in starts])
        self.split_dim = split_dim
        self.num_checkpointed = len(starts) - store_last

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        x1, x2 = (half.clone() for half in x.chunk(2, self.split_dim))  # contiguous, as in this library
        for index, group in enumerate(self.groups):
            if index < self.num_checkpointed:
                x1, x2 = checkpoint(group, x1, x2, use_reentrant=False, **self.options, **kwargs)
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


class Selective(Checkpointed):
    """Blocks in a plain loop, each under a checkpoint that keeps the outputs of convolutions, products and attention.

    Args:
        functions: Residual functions of all blocks.
        split_dim: Dimension along which the streams are concatenated.
    """

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int):
        super().__init__(functions, 1, split_dim, store_last=False)
        self.options = {"context_fn": partial(create_selective_checkpoint_contexts, _EXPENSIVE)}


class Loop(nn.Module):
    """Plain autograd: a loop over the blocks between `chunk` and `cat`.

    Args:
        functions: Residual functions of all blocks.
        split_dim: Dimension along which the streams are concatenated.
    """

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int):
        super().__init__()
        self.blocks = Group(functions)
        self.split_dim = split_dim

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        return torch.cat(self.blocks(*x.chunk(2, self.split_dim), **kwargs), self.split_dim)


class SavedOnCpu(Loop):
    """Plain autograd whose activations wait in the memory of the host for the backward pass."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda):
            return super().forward(x, **kwargs)


class Compiled(Loop):
    """Plain autograd compiled as one graph, which recomputes activations to fit a budget.

    Args:
        functions: Residual functions of all blocks.
        split_dim: Dimension along which the streams are concatenated.
        budget: Memory for activations, from 0 (only the inputs are kept) to 1 (no recomputation for memory's sake).
    """

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int, budget: float):
        super().__init__(functions, split_dim)
        torch._dynamo.reset()  # each new module would count towards the limit of recompilations
        self.budget = budget
        self.run: Callable[..., TensorPair] = torch.compile(self.blocks, fullgraph=True)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the blocks."""
        is_outermost = not torch.compiler.is_compiling()
        with functorch_config.patch(activation_memory_budget=self.budget) if is_outermost else nullcontext():
            return torch.cat(self.run(*x.chunk(2, self.split_dim), **kwargs), self.split_dim)
