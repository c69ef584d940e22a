"""Samples of all tensors that a function saves, in its first run and in every 63rd run after it, on the CPU.

The last tensor, which is compared in every run, does not show that a mask or a parallel branch has other numbers. A
function that reads random numbers from outside of PyTorch, or keeps state in attributes, is wrong in every run.
On a GPU only the last tensor is compared: some kernels save memory of which they fill only a part.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from revnet._torch_internals import sequence_number_of, tree_leaves
from revnet.engine._arrays import DTYPES, SIZE, array_of, digest_of_array, is_on_host, places
from revnet.engine._tensors import version_of

if TYPE_CHECKING:
    from revnet.engine._record import RecordedCall

CHECKSUM_INTERVAL = 63  # Odd, so that it meets each call of a function that runs twice in a step.
"""Number of calls of a function from one in which more is compared to the next: all parameters and saved tensors."""
NOISE = 1024.0
"""Units in the last place by which two runs of one function on one input may differ."""
_MOST_NOISE = 0.1
"""Largest such difference, relative to the tensor: a unit in the last place of 16 bits is large."""
_LOW_EPS = 1e-5
"""A unit in the last place that is larger belongs to a 16-bit number."""
_SUSPICIOUS = 1e-2
"""Relative error of a tensor, computed from a rebuilt input, above which the function is run again as a check."""
_INTEGERS = {torch.bool, torch.int16, torch.int32, torch.int64}
"""Dtypes of masks and indices. Bytes may be the workspace of a kernel, such as oneDNN's for an LSTM."""
_PARTLY_FILLED = ("Rrelu", "CtcLoss", "CopySlots")
"""Parts of the names of nodes that save memory of which they fill only a part."""
_NUM_INTEGERS = 256
_MOST_CHANGED = 0.01
"""Share of the sampled integers that may differ: the largest of two equal numbers may have another place."""

Sample = Any
"""A list of floats, or an array of integers."""


def noise_of(eps: float) -> float:
    """Return the relative difference that two runs of one function on one input may have in this precision."""
    return min(NOISE * eps, _MOST_NOISE)


def sample_all(call: "RecordedCall", tensors: Sequence[Tensor], nodes: Sequence[int], result: Any) -> dict[int, Sample]:
    """Return samples of the tensors that have fixed values and can be read, by their index.

    Args:
        call: The first run of the function.
        tensors: What it saved.
        nodes: The sequence number of the first node after the one that saved each tensor.
        result: What it returned.
    """
    if call.surroundings.is_captured:
        return {}
    numbers = _numbers_after_nodes(result, min(nodes, default=0))
    samples = {
        index: _sample_of(tensor)
        for index, (tensor, number) in enumerate(zip(tensors, nodes, strict=True))
        # A tensor that was written to may differ from what was saved, or be a buffer that is only partly filled.
        if number in numbers and not version_of(tensor)
    }
    return {index: sample for index, sample in samples.items() if sample is not None}


def _numbers_after_nodes(result: Any, first: int) -> set[int]:
    """Return, from `first` on, the number after each node of a result whose saved tensors have fixed values.

    Some operators save memory of which they fill only a part: noise that is not drawn in evaluation, rows after the end
    of a sequence. So may a function that a user or the compiler has written.
    """
    return {
        number
        for number, node in _numbered_nodes(result, first)
        if not isinstance(node, BackwardCFunction) and not _fills_partly(node)
    }


def may_vary(tensor: Tensor, result: Any, number: int) -> bool:
    """Return whether a saved tensor without a node may have parts whose values are not fixed.

    Integers may be a workspace, such as oneDNN's for an LSTM. Some operators fill only a part of what they save.

    Args:
        tensor: The tensor.
        result: What the function returned.
        number: The sequence number of the first node after the one that saved the tensor.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return any(after == number and _fills_partly(node) for after, node in _numbered_nodes(result, number))


def _fills_partly(node: Node) -> bool:
    return any(name in node.name() for name in _PARTLY_FILLED)


def _numbered_nodes(result: Any, first: int) -> Iterator[tuple[int, Node]]:
    """Yield the nodes of a result, each with the number after it, from `first` on."""
    seen = set()
    nodes = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or (number := sequence_number_of(node) + 1) < first:
            continue
        seen.add(node)
        yield number, node
        nodes += [before for before, _ in node.next_functions]


def different(
    samples: Mapping[int, Sample | None], tensors: Sequence[Tensor], *, is_rounded: bool
) -> dict[int, Sample]:
    """Return new samples of the tensors that differ from `samples` by more than rounding.

    Args:
        samples: Samples by the index of the tensor; None differs from every other.
        tensors: The tensors of a replay.
        is_rounded: Whether the input of the replay was rebuilt.
    """
    changed = {}
    for index, expected in samples.items():
        actual = _sample_of(tensors[index])
        if actual is not None and differs(actual, expected, tensors[index].dtype, _SUSPICIOUS if is_rounded else 0.0):
            changed[index] = actual
    return changed


def differs(actual: Sample, expected: Sample | None, dtype: torch.dtype, least: float = 0.0) -> bool:
    """Return whether samples differ by more than runs on one input, and if they are not integers, more than `least`."""
    if expected is None or dtype in _INTEGERS:
        return expected is None or bool((actual != expected).mean() > _MOST_CHANGED)
    eps = torch.finfo(dtype).eps
    # In low precision, rounding in another place moves some elements by a unit in the last place.
    limit = NOISE * eps if eps < _LOW_EPS else 4 * eps
    return actual != expected and _error(actual, expected) > max(limit, least)


def _sample_of(tensor: Tensor) -> Sample | None:
    """Return a sample of a tensor's elements, or None if they cannot be read or have no fixed values."""
    # FSDP frees the memory of a parameter after its function ran.
    if not is_on_host(tensor) or not tensor.numel() or tensor.untyped_storage().nbytes() < tensor.nbytes:
        return None
    if tensor.dtype in _INTEGERS:
        return array_of(tensor)[places(tensor.shape, _NUM_INTEGERS)]
    if tensor.dim() < 2:
        return None  # Batch norm saves running statistics that it does not use, such as the copies of instance norm.
    if tensor.dtype is torch.bfloat16:
        # Its bits are the upper half of a float32's.
        bits = array_of(tensor)[places(tensor.shape, SIZE)].astype(np.int32)
        return list((bits << 16).view(np.float32).tolist())
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return digest_of_array(array_of(tensor)) if is_number and tensor.dtype in DTYPES else None


def _error(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Return the distance of two samples relative to the expected one."""
    size = math.hypot(*expected)
    if not math.isfinite(size + sum(actual)):
        return 0.0  # The model produced NaN or inf, here or in a later function, which is undone first.
    distance = math.dist(expected, actual)
    return distance / size if size else math.inf
