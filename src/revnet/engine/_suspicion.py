"""Decide whether a function that seems to have returned a different result really did; see `AgreementWatch`."""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import sub
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
_TIMES = 3
"""Number of runs on one input that must agree. With two, a function that takes one of two branches often escapes."""


def look_closer(
    watch: "AgreementWatch",
    run: "Rebuilder",
    index: int,
    streams: StreamSnapshot,
    actual: Digest,
    expected: Digest,
    ratio: float,
    inherited: float = 0.0,
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
        inherited: The error that this stream had before the half-block was undone.
        is_tail: Whether the digests are of the last tensor that its function saved instead.
    """
    tolerated = run.chain.chain.tolerated
    # The model produced NaN or inf, or they are reported as drift.
    if math.isfinite(ratio) and ratio > tolerated.get(index, 0.0):
        eps = max(watch.eps, _tail_eps(run, index)) if is_tail else watch.eps
        check_same(run, index, streams, actual, expected, watch, eps, None if is_tail else inherited)
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
    actual: Digest,
    expected: Digest,
    watch: "AgreementWatch",
    eps: float,
    inherited: float | None,
) -> None:
    """Raise if half-block `index` returned a different result the second time, and rounding is not the reason.

    The function runs again on its current input, and on an input that is perturbed by as much as the streams are off,
    several times each. If runs on one input differ, the replay among them, it is not deterministic. If most elements of
    the result are off by far more than the perturbation explains, something that the function depends on has changed
    since the forward pass. A few elements are not enough, because a hash or a choice may jump for some elements when
    its input changes in the last place. That is drift.

    Args:
        run: The run.
        index: The index of the half-block.
        streams: The streams before the half-block.
        actual: The digest of the second result.
        expected: The digest of the first result.
        watch: Has the errors of the streams.
        eps: The precision of the digests.
        inherited: The error that the stream had before the half-block was undone. None if the digests are of the last
            tensor that the function saved.

    Raises:
        ReconstructionError: The function returned a different result.
    """
    step, is_tail = run.steps[index], inherited is None
    half_block = step.half_block
    change = _perturbation(watch, half_block)
    measure = partial(_tail_again if is_tail else _stream_again, run, index, streams)
    with _checking(run, index):
        again = [measure(None) for _ in range(_TIMES)]
        try:
            perturbed = [measure(change) for _ in range(_TIMES)]
        except ReconstructionError:
            raise
        except Exception:
            # Some functions, such as eigenvalue solvers, fail on inputs that are very close to valid ones.
            perturbed = []
    size = math.hypot(*again[0]) or 1.0
    noise = noise_of(eps)
    if streams.read(half_block.source).device.type != "cpu":  # Kernels may add in any order.
        noise = max(noise, _DEVICE_NOISE[run.surroundings.is_mixed])
    for first, *others in filter(None, (again, perturbed)):
        if any(math.dist(first, other) > noise * (math.hypot(*first) or 1.0) for other in others):
            raise not_the_same(half_block.name, "and different ones each time")
    if not half_block.coupling.is_exact:
        if not perturbed:  # The effect of rounding is unknown, so the difference may be drift.
            return
        # The sum was rounded at the size of the larger of the two: the stream before or after.
        rounding = max(inherited or 0.0, eps * max(size, math.hypot(*expected))) / len(expected) ** 0.5
        floor = EXCESS * max(rounding, _median_distance(perturbed[0], again[0]))
        replayed = actual if is_tail else _result_of_replay(watch, run, index)
        # The input is the same, but a replay with kept results took them from another one.
        if replayed and _median_distance(again[0], replayed) > (floor if step.keepers else EXCESS * rounding):
            raise not_the_same(half_block.name, "and different ones each time")
        if not half_block.coupling.is_additive and not is_tail:
            floor *= _magnification(run, index, streams)
        if not _median_distance(actual, expected) > floor:
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


def _result_of_replay(watch: "AgreementWatch", run: "Rebuilder", index: int) -> Digest:
    """Return the digest of the stream after half-block `index` in the forward pass.

    A run that repeats the replay gives this stream again, up to the error that it was rebuilt with.
    """
    half_blocks = run.chain.chain.half_blocks
    target = half_blocks[index].target
    later = [other for other in watch.before if other > index and half_blocks[other].target == target]
    return watch.before[min(later)] if later else watch.final.get(target, [])


def _magnification(run: "Rebuilder", index: int, streams: StreamSnapshot) -> float:
    """Return the factor by which undoing half-block `index` magnifies an error of the stream that it updates."""
    step = run.steps[index]
    with _checking(run, index):
        y = step.redo(run, fork(streams))
        changed = y * (1 + torch.finfo(y.dtype).eps ** 0.25)  # Enough to be seen next to a residual that is larger.
        after = [digest_of(y), digest_of(changed)]
        before = [_undone(run, index, streams, result) for result in (y, changed)]
    return _median_distance(*before) / (_median_distance(*after) or math.inf)


def _undone(run: "Rebuilder", index: int, streams: StreamSnapshot, y: Tensor) -> Digest:
    """Return a digest of the stream before half-block `index`, if the stream after it is `y`, which is overwritten."""
    copy, target = fork(streams), run.steps[index].half_block.target
    copy.put(target, y)
    copy.position = index + 1
    run.steps[index].undo(run, copy, fill=False)
    return digest_of(copy.read(target))


def _tail_again(run: "Rebuilder", index: int, streams: StreamSnapshot, change: Change) -> Digest:
    """Return a digest of the last tensor that half-block `index` saves."""
    step = run.steps[index]
    assert step.tail is not None
    step.rerun(run, _perturbed(streams, step.half_block, change), index)
    return step.tail.actual


def _median_distance(a: Digest, b: Digest) -> float:
    return statistics.median(map(abs, map(sub, a, b)))
