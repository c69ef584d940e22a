"""Whether a function that seems to have given something else the second time really did; see `AgreementWatch`."""

import math
import statistics
from collections.abc import Callable
from operator import sub
from typing import TYPE_CHECKING

import torch

from revnet.engine._careful import not_the_same
from revnet.engine._digest import NOISE, Digest, digest_of
from revnet.engine._streams import StreamSnapshot

if TYPE_CHECKING:
    from revnet.engine._agreement import AgreementWatch
    from revnet.engine._rebuild import Rebuilder

Change = tuple[float, float] | None
"""By how much each element is changed, relative to itself and whatever its size; None for not at all."""

EXCESS = 100.0
"""By how much more a result must be off than a perturbation of its input makes it, so that it is not drift."""


def check_same(
    run: "Rebuilder",
    index: int,
    measure: Callable[[Change], Digest],
    found: Digest,
    expected: Digest,
    watch: "AgreementWatch",
) -> None:
    """Raise if half-block `index` gave something else the second time for another reason than rounding.

    The function runs twice more on the input that it has just had: two results that differ show that it is not
    deterministic. Then once on an input that is perturbed by as much as the streams are off: if most elements are off
    by far more than that explains, something that the function depends on has changed since the forward pass. (Most,
    since a hash or a choice may jump for a few elements where its input moves in the last place: that is drift.)

    Args:
        run: The run.
        index: The half-block.
        measure: Runs the function with its input changed or as it is, and returns a digest of what it gives.
        found: The digest of what it gave the second time.
        expected: The digest of what it gave the first time.
        watch: Knows how far the streams are off.

    Raises:
        ReconstructionError: It did.
    """
    half_block, eps = run.steps[index].half_block, watch.eps
    change = watch.perturbation(half_block.source)
    run.is_checking = True
    try:
        again, once_more, perturbed = measure(None), measure(None), measure(change)
    finally:
        run.is_checking = False
    size = math.hypot(*again) or 1.0
    if math.dist(again, once_more) > NOISE * eps * size:
        raise not_the_same(half_block.name, "and other numbers each time that it runs")
    response = _median_distance(perturbed, again)
    floor = max(response, eps * size / len(expected) ** 0.5)
    if half_block.coupling.is_exact or _median_distance(found, expected) > EXCESS * floor:
        raise not_the_same(half_block.name, "which rounding of its input does not explain")


def _perturbed(streams: StreamSnapshot, which: int, change: Change) -> StreamSnapshot:
    """Return a copy of the streams, of which one is changed, up or down at each element."""
    copy = streams.fork()
    if change is not None:
        relative, absolute = change
        source = copy.read(which)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, source.shape, generator=generator).mul_(2).sub_(1)
        copy.put(which, source + signs.to(source.dtype) * (source.abs() * relative + absolute))
    return copy


def stream_again(run: "Rebuilder", index: int, streams: StreamSnapshot, change: Change) -> Digest:
    """Return a digest of the stream that half-block `index` makes of the streams before it."""
    step = run.steps[index]
    return digest_of(step.redo(run, _perturbed(streams, step.half_block.source, change)))


def tail_again(run: "Rebuilder", index: int, streams: StreamSnapshot, change: Change) -> Digest:
    """Return a digest of the last tensor that half-block `index` saves."""
    step = run.steps[index]
    assert step.tail is not None
    step.rerun(run, _perturbed(streams, step.half_block.source, change), index)
    return step.tail.found


def _median_distance(a: Digest, b: Digest) -> float:
    return statistics.median(map(abs, map(sub, a, b)))
