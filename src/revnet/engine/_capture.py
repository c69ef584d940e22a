"""Run while a CUDA graph is captured: nothing reads the device, and random numbers repeat within the graph.

Experimental: written, not run on a GPU.

A capture runs Python once and records the kernels, which `replay` runs again without Python. Reading a value from the
device is an error then, so a captured run has no observers that compare values. The eager steps that warm up a capture
have them. Checks that need no host remain, as assertions on the device.

The state of a CUDA generator is a seed and an offset. While a graph is captured, PyTorch counts the offset from the
beginning of the graph, and adds the generator's own offset in each replay of the graph. A replay of a function sets
back the offset, which PyTorch permits from release 2.10 on. That gives the same numbers only in the capture in which
the function ran for the first time: another graph counts from its own beginning.

References:
    PyTorch pull requests 162505 (random states during a capture) and 176752 (one state for each capture).
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._chain import HalfBlock
    from revnet.engine._plan import Plan

_READABLE_SINCE = (2, 10)
"""Release of PyTorch from which on random states can be read and set while a graph is captured."""
_SEED_BYTES = 8
"""Bytes before the offset in the state of a CUDA generator."""

# Tests replace them.
_is_initialized: Callable[[], bool] = torch.cuda.is_initialized
_is_stream_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing


def is_capturing() -> bool:
    """Return whether the current CUDA stream is captured in a graph."""
    # Asked first: PyTorch for CUDA may run on a machine without a driver, where the other question is an error.
    return _is_initialized() and _is_stream_capturing()


def begins_in_capture() -> bool:
    """Return whether a run that begins now is captured.

    Raises:
        NotImplementedError: It is, and this release of PyTorch cannot set back random numbers there.
    """
    if not is_capturing():
        return False
    if tuple(map(int, torch.__version__.split(".")[:2])) < _READABLE_SINCE:
        raise NotImplementedError(
            f"a reversible sequence cannot be captured in a CUDA graph with PyTorch {torch.__version__}, which cannot "
            "read random states during a capture; use PyTorch 2.10 or later, or the policy `Store()`."
        )
    return True


def check_warmed_up(half_blocks: "Sequence[HalfBlock]", plans: "Sequence[Plan | None]") -> None:
    """Raise unless the functions of a chain have run in their current mode before they are captured.

    Some functions need values to be compared: ones that write to a tensor without raising its version, for instance. A
    single half-block rebuilds nothing, and is not compared in eager steps either.

    Raises:
        ReconstructionError: A function has not run, or not in this mode.
    """
    for half_block, plan in zip(half_blocks, plans, strict=True):
        is_new = plan is None or list(map(plan.get_flag, plan.flag_holders)) != plan.training
        if is_new and len(plans) > 1:
            raise ReconstructionError(
                f"`{half_block.name}` is called for the first time while a CUDA graph is captured, where its results "
                "cannot be compared with a second run; run a training step before the capture."
            )


def check_same_mode(was_capturing: bool) -> None:
    """Raise unless the backward pass is captured exactly if the forward pass was.

    Raises:
        ReconstructionError: One of the two is captured, and the other is not.
    """
    if was_capturing != is_capturing():
        captured, eager = ("forward", "backward") if was_capturing else ("backward", "forward")
        raise ReconstructionError(
            f"the {captured} pass of a reversible sequence is captured in a CUDA graph, but its {eager} pass is not, "
            "so its activations cannot be rebuilt; capture both passes, or neither."
        )


def check_same_graph(
    name: str, drawn: Iterable[tuple[torch.device, Tensor, int | None]], states: Iterable[Tensor]
) -> None:
    """Raise if a function that draws random numbers is about to run again in another graph than before.

    Args:
        name: The function's place in the model.
        drawn: For each device on which the function draws: its random state before the first run, and a digest of the
            state after, or None if the function need not repeat its numbers.
        states: The current random states of these devices.

    Raises:
        ReconstructionError: The generator has not advanced since then, so this is another graph.
    """
    for (device, before, digest), state in zip(drawn, states, strict=True):
        if device.type == "cuda" and digest is not None and offset_of(state) <= offset_of(before):
            raise ReconstructionError(
                f"`{name}` drew random numbers on {device} in another CUDA graph than the one that captures the "
                "backward pass, which cannot repeat them; capture both passes in one graph with `torch.cuda.graph` "
                "instead of `make_graphed_callables`, or store its block's activations with the policy `Store()`."
            )


def offset_of(state: Tensor) -> int:
    """Return the offset in the state of a CUDA generator."""
    return ctypes.c_int64.from_address(state.data_ptr() + _SEED_BYTES).value
