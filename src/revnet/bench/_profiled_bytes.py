"""Count the bytes that the CPU's allocator hands out, also to compiled code, which no dispatch mode sees."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_MARK = 1_000_003
"""Size of an allocation between the two passes. It is odd, unlike the sizes of tensors of numbers."""


def profile_step(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Run a forward pass and its backward pass under PyTorch's profiler.

    Args:
        forward: Function that returns the loss.

    Returns:
        The largest number of bytes alive at once, and the bytes alive between the two passes, both less the bytes at
        the start. Memory inside kernels is included.
    """
    # One profile for both passes, since it knows only blocks that were allocated while it runs.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        loss = forward()
        torch.empty(_MARK, dtype=torch.uint8)
        loss.backward()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    held = sum(sizes[: sizes.index(_MARK)])
    return max(accumulate(size for size in sizes if abs(size) != _MARK)), held
