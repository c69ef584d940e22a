"""A training loop of 2,000 steps keeps no Python object, tensor or resident memory alive.

`make test-slow` runs all slow tests. To run this file alone:

    python -m pytest -m slow -rP --show-capture=stdout tests/contracts/test_long_training.py
"""

import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import mlp

NUM_FEATURES = 32
BATCH_SIZE = 64
FIRST, LAST = 200, 2000
SLACK_BYTES = 4 * 2**20
"""Bytes that the allocator may take or return by chance."""


class Live(NamedTuple):
    """Objects, tensors and memory of a process."""

    num_objects: int
    num_tensors: int
    resident_bytes: int


def count_live() -> tuple[int, int, int]:
    num_objects, num_tensors = 0, 0
    for value in gc.get_objects():
        num_objects += 1
        # By its type, because objects that imitate another class may fail when asked.
        num_tensors += issubclass(type(value), Tensor)
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_objects, num_tensors, num_pages * os.sysconf("SC_PAGE_SIZE")


def train(policy) -> tuple[Live, Live]:
    """Return the live objects after the first steps, which fill all caches, and after the last step."""
    torch.manual_seed(0)
    blocks = [
        ReversibleBlock(
            nn.Sequential(nn.BatchNorm1d(NUM_FEATURES), mlp(NUM_FEATURES)),
            nn.Sequential(mlp(NUM_FEATURES), nn.Dropout(0.1)),
        )
        for _ in range(3)
    ]
    sequence = ReversibleSequential(*blocks, policy=policy)
    optimizer = torch.optim.SGD(sequence.parameters(), 1e-3, momentum=0.9)
    x = torch.randn(BATCH_SIZE, 2 * NUM_FEATURES)

    def step() -> None:
        optimizer.zero_grad()
        sequence(x).square().mean().backward()
        optimizer.step()

    gc.collect()
    gc.disable()  # Objects that only the garbage collector frees count as leaked.
    try:
        for _ in range(FIRST):
            step()
        num_objects, num_tensors, resident_bytes = count_live()  # numbers, since a `Live` would be one more object
        for _ in range(LAST - FIRST):
            step()
        last = Live(*count_live())
        return Live(num_objects, num_tensors, resident_bytes), last
    finally:
        gc.enable()


def resident_growth(first: Live, last: Live) -> int:
    return last.resident_bytes - first.resident_bytes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=["reverse", "checkpoint"])
def test_memory_is_flat_over_two_thousand_steps(policy):
    # A leak of one stream per step would show.
    assert (LAST - FIRST) * BATCH_SIZE * NUM_FEATURES * 4 > 2 * SLACK_BYTES
    plain = resident_growth(*train(Store()))
    first, last = train(policy)
    print(f"{policy}: {first} after {FIRST} steps, {last} after {LAST}; plain autograd grew by {plain} bytes")
    assert last.num_objects == first.num_objects
    assert last.num_tensors == first.num_tensors
    assert resident_growth(first, last) <= max(plain, 0) + SLACK_BYTES
