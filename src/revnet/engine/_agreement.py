"""Whether what runs a second time is what ran the first time, as far as a few numbers can tell; on the CPU.

The forward pass keeps a digest of each stream before it is updated, and of the last tensor that a function saved where
the result of the function is not compared. The backward pass compares them with what it rebuilds. Three things can be
wrong:

- The output was written over without a version (through `.data` or NumPy): its checksum differs. An error.
- A function gave something else the second time (its own random generator, state in attributes, a tensor from
  elsewhere that has changed): its result is off by far more than its input was. An error, after the function was run
  again to make sure.
- Rounding was amplified: drift. A warning, once for each function; see `_drift`.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from operator import sub
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revnet.engine._careful import NOISE, not_the_same
from revnet.engine._chain import HalfBlock
from revnet.engine._digest import Digest, Parts, checksum, digest_of, parts_of, relative_errors
from revnet.engine._drift import StreamKind, report
from revnet.engine._observer import Observer
from revnet.engine._streams import StreamSnapshot
from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.complex128, torch.complex64)

Change = tuple[float, float] | None
"""By how much each element is changed, relative to itself and whatever its size; None for not at all."""

SUSPICIOUS = 64.0
"""By how much more a result may be off than the streams so far, before its function is run again to make sure.

A residual function amplifies a relative error a few times; if each did so by 64, a float32 stream would be lost after
four blocks. The number decides when to look closer, not what is an error.
"""
EXCESS = 100.0
"""By how much more a result must be off than a perturbation of its input makes it, so that it is not drift."""
_FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in _DTYPES}


class AgreementWatch(Observer):
    """Compares digests of one run; an observer."""

    def __init__(self) -> None:
        self._before: dict[int, Digest] = {}
        """Of the stream that each half-block updates, before it does."""
        self._checksums: list[int | None] = []
        self._sizes: list[float] = []
        """The norm of each stream's digest, as it is at present."""
        self._errors: list[float] = []
        """How far the digest of each stream is off at present, by its norm."""
        self._worst = 0.0
        """The largest error of any stream so far in this walk, relative to the larger stream at each step."""
        self._position = -1
        self._eps = torch.finfo(torch.float32).eps
        self._first: Parts | None = None
        """Of what the lowest function reads, whose rebuilt stream has come the longest way."""
        self._final: list[Digest] = []
        """Of the final streams."""

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Digest the stream that half-block `index` updates, if it will be rebuilt."""
        if -1 < run.lowest < index:
            self._before[index] = digest_of(streams[half_block.target])
        elif index == run.lowest:
            self._first = parts_of(streams[half_block.source])
            self._eps = torch.finfo(streams[half_block.source].dtype).eps

    def on_hold(self, streams: Sequence[Tensor | None]) -> None:
        """Note the checksums of the final streams, which depend on how they lie."""
        self._checksums = [None if stream is None else checksum(stream) for stream in streams]

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Raise if a final stream is not what it was.

        Raises:
            ReconstructionError: It was written over, in a way that leaves no version.
        """
        assert run.held is not None
        for stream in run.held.held:
            if stream is not None and self._first is not None:
                self._final.append(digest_of(stream))
        for which, (stream, expected) in enumerate(zip(run.held.held, self._checksums, strict=True)):
            # A stream with another version raises when it is read, by its own error.
            is_silent = stream is not None and expected is not None and run.held.is_unmodified(which)
            if stream is not None and is_silent and checksum(stream) != expected:
                raise ReconstructionError(
                    f"an output of a reversible sequence, of shape {tuple(stream.shape)}, was written over after the "
                    "forward pass, through `.data`, NumPy or the like; the activations are rebuilt from that output: "
                    "`clone` it before writing, or use the policy `Store()` for the last block."
                )

    def before_replay(self, run: "Rebuilder", index: int, streams: StreamSnapshot, distance: int) -> None:
        """Judge the drift of what the lowest function reads, once.

        Raises:
            ReconstructionError: NaN or inf is in it that was not there in the forward pass.
        """
        if index != run.lowest or self._first is None:
            return
        half_block = run.steps[index].half_block
        source, first = streams.read(half_block.source), self._first
        self._first = None
        found = parts_of(source).values
        # What is nothing compared with the other stream must not count as infinite where this one is zero.
        size = max([math.hypot(*digest) / max(1, len(digest)) ** 0.5 for digest in self._final], default=0.0)
        error, of_part = relative_errors(found, first, size * torch.finfo(source.dtype).eps ** 0.5)
        kind = StreamKind(half_block.name, source.dtype, half_block.coupling.is_exact, run.surroundings.is_mixed)
        # NaN and inf stay in a stream to its end. If they are in none of the samples, the model did not make them.
        is_finite = math.isfinite(found.sum())
        was_finite = is_finite or math.isfinite(sum(map(sum, (*self._final, *self._before.values()))))
        report(half_block.function, kind, error, of_part, is_finite=is_finite, was_finite=was_finite)

    def after_undo(self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: StreamSnapshot) -> None:
        """Compare the stream that was rebuilt by undoing half-block `index`."""
        expected, target = self._before.get(index), half_block.target
        x = streams.held[target]
        if expected is None or x is None:
            return
        found = digest_of(x)
        count = len(streams.strides)
        if index >= self._position:  # A new walk, from streams that are true.
            self._worst, self._sizes, self._errors = 0.0, [0.0] * count, [0.0] * count
        self._position = index
        size = math.hypot(*expected)
        # The sum was rounded at the size of the larger one, before or after.
        scale = max(size, self._sizes[target])
        self._sizes[target], self._errors[target] = size, 0.0
        if found == expected:
            return
        self._errors[target] = error = math.dist(found, expected)
        before = max(self._worst, self._relative_error(half_block.source), _FLOOR[x.dtype])
        if not error <= scale * SUSPICIOUS * before or half_block.coupling.is_exact:
            self._look_closer(run, index, streams, found, expected, error / (scale * before) if scale else math.inf)
        if scale:
            self._worst = max(self._worst, error / scale)

    def _relative_error(self, stream: int) -> float:
        """Return how far a stream is off at present, relative to itself; 0 for one that was not undone yet."""
        size = self._sizes[stream] if self._sizes else 0.0
        return self._errors[stream] / size if size else 0.0

    def _look_closer(
        self,
        run: "Rebuilder",
        index: int,
        streams: StreamSnapshot,
        found: Digest,
        expected: Digest,
        ratio: float,
    ) -> None:
        """Raise if the stream before half-block `index` is wrong for another reason than rounding."""
        tolerated = run.chain.chain.tolerated
        # NaN and inf are the model's own, or reported as drift.
        if math.isfinite(ratio) and ratio > tolerated.get(index, 0.0):
            check_same(run, index, lambda change: digest_of(_redo(run, index, streams, change)), found, expected, self)
            tolerated[index] = 4 * ratio

    def after_fill(self, run: "Rebuilder", index: int, streams: StreamSnapshot) -> None:
        """Compare the last tensor that the lowest function saved, since its result is not looked at."""
        call, half_block = run.steps[index].call, run.steps[index].half_block
        before = max(self._worst, self._relative_error(half_block.source), 4 * self._eps)
        tolerated, ratio = run.chain.chain.tolerated, call.tail_error / before
        if math.isfinite(ratio) and ratio > tolerated.get(index, SUSPICIOUS):
            found, expected = call.tail_found, call.tail
            assert found is not None
            assert expected is not None
            check_same(run, index, lambda change: _tail(run, index, streams, change), found, expected, self)
            tolerated[index] = 4 * ratio

    @property
    def eps(self) -> float:
        """The unit in the last place of the streams."""
        return self._eps

    def perturbation(self, stream: int) -> tuple[float, float]:
        """Return by how much a stream may be off: relative to each element, and of any element."""
        numel = len(next(iter(self._before.values()), [0.0]))
        error = self._errors[stream] if self._errors else 0.0
        relative = max(self._worst, self._relative_error(stream), 16 * self._eps)
        return relative, 2 * error / math.sqrt(max(1, numel))

    def after_backward(self, run: "Rebuilder") -> None:
        """Start again with the next walk of a retained graph."""
        self._position = -1


def check_same(
    run: "Rebuilder",
    index: int,
    measure: Callable[[Change], Digest],
    found: Digest,
    expected: Digest,
    watch: AgreementWatch,
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


def _redo(run: "Rebuilder", index: int, streams: StreamSnapshot, change: Change) -> Tensor:
    """Return the stream that half-block `index` makes of the streams before it."""
    step = run.steps[index]
    return step.redo(run, _perturbed(streams, step.half_block.source, change))


def _tail(run: "Rebuilder", index: int, streams: StreamSnapshot, change: Change) -> Digest:
    """Return a digest of the last tensor that half-block `index` saves."""
    step = run.steps[index]
    step.rerun(run, _perturbed(streams, step.half_block.source, change), index)
    assert step.call.tail_found is not None
    return step.call.tail_found


def _median_distance(a: Digest, b: Digest) -> float:
    return statistics.median(map(abs, map(sub, a, b)))
