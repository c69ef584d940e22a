"""Decide whether a function that seems to have returned a different result really did; see `AgreementWatch`."""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import sub
from typing import TYPE_CHECKING

import torch

from revnet.engine._careful import not_the_same
from revnet.engine._chain import HalfBlock
from revnet.engine._digest import Digest, digest_of
from revnet.engine._retained import fork
from revnet.engine._saved_samples import differs, noise_of
from revnet.engine._streams import StreamSnapshot
from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._agreement import AgreementWatch
    from revnet.engine._rebuild import Rebuilder

Change = tuple[float, float] | None
"""Relative and absolute change of each element; None for no change."""

_DEVICE_NOISE = {False: 1e-2, True: 1e-1}
"""Relative difference that two runs on one input may have on a GPU, without autocast and with it."""
SUSPICIOUS = 64.0
"""Ratio of an error to the errors so far above which the function is run again as a check.

If every function amplified errors by this factor, a float32 stream would be lost after four blocks.
"""
EXCESS = 100.0
"""Factor by which an error must exceed the effect of a perturbed input, so that it is not drift."""


def look_closer(
    watch: "AgreementWatch",
    run: "Rebuilder",
    index: int,
    streams: StreamSnapshot,
    actual: Digest,
    expected: Digest,
    ratio: float,
    *,
    is_tail: bool = False,
) -> None:
    """Raise if half-block `index` returned a different result the second time, and rounding is not the reason.

    Args:
        watch: Has the errors of the streams.
        run: The run.
        index: The index of the half-block.
        streams: The streams before the half-block.
        actual: The digest of the rebuilt stream that it updates.
        expected: The digest of the true stream.
        ratio: The error of the rebuilt stream, relative to the errors of the streams so far.
        is_tail: Whether the digests are of the last tensor that its function saved instead.
    """
    tolerated = run.chain.chain.tolerated
    # The model produced NaN or inf, or they are reported as drift.
    if math.isfinite(ratio) and ratio > tolerated.get(index, 0.0):
        measure = partial(_tail_again if is_tail else _stream_again, run, index, streams)
        eps = max(watch.eps, _tail_eps(run, index)) if is_tail else watch.eps
        check_same(run, index, streams, measure, actual, expected, watch, eps)
        # With a margin, so that the next steps do not repeat the same check.
        tolerated[index] = 4 * ratio


def _perturbation(watch: "AgreementWatch", half_block: HalfBlock) -> tuple[float, float]:
    """Return by how much a stream that it reads may be off: relative to each element, and in absolute terms."""
    numel = len(next(iter(watch.before.values()), [0.0]))
    error = max([watch.errors[stream] for stream in half_block.sources]) if watch.errors else 0.0
    relative = max(watch.worst, 16 * watch.eps, *map(watch.relative_error, half_block.sources))
    return relative, 2 * error / math.sqrt(max(1, numel))


def check_same(
    run: "Rebuilder",
    index: int,
    streams: StreamSnapshot,
    measure: Callable[[Change], Digest],
    actual: Digest,
    expected: Digest,
    watch: "AgreementWatch",
    eps: float,
) -> None:
    """Raise if half-block `index` returned a different result the second time, and rounding is not the reason.

    The function runs two more times on its current input. If the results differ, it is not deterministic. Then it runs
    once on an input that is perturbed by as much as the streams are off. If most elements of the result are off by far
    more than that explains, something that the function depends on has changed since the forward pass. A few elements
    are not enough, because a hash or a choice may jump for some elements when its input changes in the last place.
    That is drift.

    Args:
        run: The run.
        index: The index of the half-block.
        streams: The streams before the half-block.
        measure: Runs the function, with its input changed or unchanged, and returns a digest of the result.
        actual: The digest of the second result.
        expected: The digest of the first result.
        watch: Has the errors of the streams.
        eps: The precision of the digests.

    Raises:
        ReconstructionError: The function returned a different result.
    """
    half_block = run.steps[index].half_block
    change = _perturbation(watch, half_block)
    with _checking(run, index):
        again, once_more = measure(None), measure(None)
        try:
            perturbed = measure(change)
        except ReconstructionError:
            raise
        except Exception:
            # Some functions, such as eigenvalue solvers, fail on inputs that are very close to valid ones.
            perturbed = None
    size = math.hypot(*again) or 1.0
    noise = noise_of(eps)
    if streams.read(half_block.source).device.type != "cpu":  # Kernels may add in any order.
        noise = max(noise, _DEVICE_NOISE[run.surroundings.is_mixed])
    if math.dist(again, once_more) > noise * size:
        raise not_the_same(half_block.name, "and different ones each time")
    if not half_block.coupling.is_exact:
        if perturbed is None:  # The effect of rounding is unknown, so the difference may be drift.
            return
        response = _median_distance(perturbed, again)
        # A result that does not respond at all is still rounded.
        floor = max(response, eps * size / len(expected) ** 0.5)
        if not _median_distance(actual, expected) > EXCESS * floor:
            return
    raise not_the_same(half_block.name, "which rounding of its input does not explain")


def check_repeats(run: "Rebuilder", index: int, streams: StreamSnapshot) -> None:
    """Raise if the tensors that half-block `index` saved, and that are suspects, are different ones in each run.

    They are compared only between two runs on the same input. Rounding of the input can move all elements of a sorted
    tensor, which is not an error.
    """
    step = run.steps[index]
    assert step.tail is not None
    tail, expected = step.tail, step.tail.others
    tail.others = dict.fromkeys(tail.suspects)
    runs = []
    try:
        with _checking(run, index):
            for _ in range(2):
                step.rerun(run, fork(streams), index)
                runs.append(tail.suspects)
    finally:
        tail.others, tail.suspects = expected, {}
    if any(differs(runs[1][number], sample, step.metas[number][1]) for number, sample in runs[0].items()):
        raise not_the_same(step.half_block.name, "and different ones each time")


@contextmanager
def _checking(run: "Rebuilder", index: int) -> Iterator[None]:
    step = run.steps[index]
    # The input may be changed on purpose; an observer would correct it.
    run.is_checking = True
    # What the first run kept would hide the change.
    keepers, step.keepers = step.keepers, ()
    try:
        yield
    finally:
        run.is_checking, step.keepers = False, keepers


def _tail_eps(run: "Rebuilder", index: int) -> float:
    step = run.steps[index]
    assert step.tail is not None
    return torch.finfo(step.metas[step.tail.index][1]).eps


def _perturbed(streams: StreamSnapshot, half_block: HalfBlock, change: Change) -> StreamSnapshot:
    """Return a copy of the streams in which each element that `half_block` reads is changed, up or down."""
    # A fork, because the walk goes on from these streams.
    copy = fork(streams)
    # A generator of its own: the global one would advance, and change the training run.
    generator = torch.Generator().manual_seed(0)
    for number in () if change is None else half_block.sources:
        relative, absolute = change  # type: ignore[misc]
        source = copy.read(number)
        signs = torch.randint(0, 2, source.shape, generator=generator).mul_(2).sub_(1)
        copy.put(number, source + signs.to(source) * (source.abs() * relative + absolute))
    return copy


def _stream_again(run: "Rebuilder", index: int, streams: StreamSnapshot, change: Change) -> Digest:
    """Return a digest of the stream that half-block `index` computes from the streams before it."""
    step = run.steps[index]
    return digest_of(step.redo(run, _perturbed(streams, step.half_block, change)))


def _tail_again(run: "Rebuilder", index: int, streams: StreamSnapshot, change: Change) -> Digest:
    """Return a digest of the last tensor that half-block `index` saves."""
    step = run.steps[index]
    assert step.tail is not None
    step.rerun(run, _perturbed(streams, step.half_block, change), index)
    return step.tail.actual


def _median_distance(a: Digest, b: Digest) -> float:
    return statistics.median(map(abs, map(sub, a, b)))
