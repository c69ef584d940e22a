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
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revnet.engine import _careful
from revnet.engine._chain import HalfBlock
from revnet.engine._digest import Digest, Parts, checksum, digest_of, parts_of, reader_of, relative_errors
from revnet.engine._drift import PART, WARN_ABOVE, StreamKind, report
from revnet.engine._observer import Observer
from revnet.engine._streams import StreamSnapshot
from revnet.engine._suspicion import check_same, stream_again, tail_again

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder

SUSPICIOUS = 64.0
"""By how much more a result may be off than the streams so far, before its function is run again to make sure.

A residual function amplifies a relative error a few times; if each did so by 64, a float32 stream would be lost after
four blocks. The number decides when to look closer, not what is an error.
"""
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.complex128, torch.complex64)
_FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in _DTYPES}
"""The relative error of rounding, by which any stream may be off."""


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
        self._read: Any = None
        """Reads a stream at an address, if it is as most are: contiguous, of `_numel` elements and of `_dtype`."""
        self._numel, self._dtype, self._every = 0, torch.float32, slice(None)
        self._final: dict[int, Digest] = {}
        """Of the final streams."""

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Digest the stream that half-block `index` updates, if it will be rebuilt."""
        if index >= len(run.chain.chain.half_blocks) - len(streams):
            self._final[half_block.target] = digest_of(y)
        if -1 < run.lowest < index:
            x = streams[half_block.target]
            if x.dtype is self._dtype and x.numel() == self._numel and x.is_contiguous():
                self._before[index] = self._read(x.data_ptr())[self._every]
            else:
                self._before[index] = digest_of(x)
        elif index == run.lowest:
            source = streams[half_block.source]
            self._first = parts_of(source)
            self._eps = torch.finfo(source.dtype).eps
            self._read, self._every = reader_of(source)
            self._numel, self._dtype = source.numel() if self._read else -1, source.dtype

    def on_hold(self, streams: Sequence[Tensor | None]) -> None:
        """Note the checksums of the final streams, which depend on how they lie."""
        self._checksums = [None if stream is None else checksum(stream) for stream in streams]

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Raise if a final stream is not what it was.

        Raises:
            ReconstructionError: It was written over, in a way that leaves no version.
        """
        assert run.held is not None
        for stream, version, expected in zip(run.held.held, run.held.versions, self._checksums, strict=True):
            # A stream with another version raises when it is read, by its own error.
            is_silent = stream is not None and expected is not None and stream._version == version
            if stream is not None and is_silent and checksum(stream) != expected:
                raise _careful.overwritten_output(stream)

    def after_undo(self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: StreamSnapshot) -> None:
        """Compare the stream that was rebuilt by undoing half-block `index`."""
        if self._first is not None and index == run.lowest + 1:
            first, self._first, lowest = self._first, None, run.steps[run.lowest].half_block
            self._judge(run, lowest, streams.read(lowest.source), first)
        expected, target = self._before.get(index), half_block.target
        x = streams.held[target]
        if expected is None or x is None:
            return
        if x.dtype is self._dtype and x.numel() == self._numel and x.is_contiguous():
            found = self._read(x.data_ptr())[self._every]
        else:
            found = digest_of(x)
        if index >= self._position:  # A new walk, from streams that are true.
            count = len(streams.strides)
            self._worst, self._sizes, self._errors = 0.0, [0.0] * count, [0.0] * count
        self._position = index
        size = math.hypot(*expected)
        # The sum was rounded at the size of the larger one, before or after.
        scale = max(size, self._sizes[target])
        self._sizes[target], self._errors[target] = size, 0.0
        if found == expected:
            return
        self._errors[target] = error = math.dist(found, expected)
        of_source = self._sizes[half_block.source]
        of_source = self._errors[half_block.source] / of_source if of_source else 0.0
        before = max(self._worst, of_source, _FLOOR[x.dtype])
        if not error <= scale * SUSPICIOUS * before or half_block.coupling.is_exact:
            self._look_closer(run, index, streams, found, expected, error / (scale * before) if scale else math.inf)
        if scale:
            self._worst = max(self._worst, error / scale)

    def _judge(self, run: "Rebuilder", half_block: HalfBlock, source: Tensor, first: Parts) -> None:
        """Judge the drift of what the lowest function is about to read again.

        Raises:
            ReconstructionError: NaN or inf is in it that was not there in the forward pass.
        """
        found = parts_of(source).values
        # What is nothing compared with the other stream must not count as infinite where this one is zero.
        size = max([math.hypot(*digest) / max(1, len(digest)) ** 0.5 for digest in self._final.values()], default=0.0)
        error, of_part = relative_errors(found, first, size * torch.finfo(source.dtype).eps ** 0.5)
        # NaN and inf stay in a stream to its end. If they are in none of the samples, the model did not make them.
        is_finite = math.isfinite(found.sum())
        if (
            is_finite
            and max(error, of_part / PART) <= WARN_ABOVE.get(source.dtype, 0.0)
            and not half_block.coupling.is_exact
        ):
            return
        was_finite = is_finite or math.isfinite(sum(map(sum, (*self._final.values(), *self._before.values()))))
        kind = StreamKind(half_block.name, source.dtype, half_block.coupling.is_exact, run.surroundings.is_mixed)
        report(half_block.function, kind, error, of_part, is_finite=is_finite, was_finite=was_finite)

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
            check_same(run, index, partial(stream_again, run, index, streams), found, expected, self)
            tolerated[index] = 4 * ratio

    def after_fill(self, run: "Rebuilder", index: int, streams: StreamSnapshot) -> None:
        """Compare the last tensor that the lowest function saved, since its result is not looked at."""
        step = run.steps[index]
        tail = step.tail
        assert tail is not None
        before = max(self._worst, self._relative_error(step.half_block.source), 4 * self._eps)
        tolerated, ratio = run.chain.chain.tolerated, tail.error / before
        if math.isfinite(ratio) and ratio > tolerated.get(index, SUSPICIOUS):
            measure = partial(tail_again, run, index, streams)
            check_same(run, index, measure, tail.found, tail.expected, self)
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
