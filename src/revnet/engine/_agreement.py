"""Check that a second run repeats the first one, by comparing small samples of tensors (on the CPU).

An output that was overwritten without raising its version (through `.data` or NumPy) has a different checksum, which is
an error. A function that gives a different result the second time is off by far more than its input: an error, see
`_suspicion`. Amplified rounding is drift: a warning, see `_drift_verdict`.
"""

import math
from collections.abc import Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revnet.engine import _careful, _parts, _suspicion
from revnet.engine._arrays import DTYPES, reader_of
from revnet.engine._chain import HalfBlock
from revnet.engine._digest import Digest, checksum, digest_of
from revnet.engine._drift_verdict import PART, WARN_ABOVE, report_drift
from revnet.engine._observer import Observer
from revnet.engine._streams import StreamSnapshot

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder

PARTS_INTERVAL = 16  # Runs between two comparisons of the parts of a stream, which cost much on small tensors.
_FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in DTYPES if dtype.is_floating_point or dtype.is_complex}


class AgreementWatch(Observer):
    """Observer that compares the digests of one run."""

    def __init__(self) -> None:
        self.before: dict[int, Digest] = {}
        """Digest of the stream that each half-block updates, before the update."""
        self.final: dict[int, Digest] = {}
        """Digests of the final streams."""
        self._checksums: list[tuple[Tensor, int | None, int]] = []
        self.sizes: list[float] = []
        self.errors: list[float] = []
        """Norm of each stream's digest at the current position, and its distance from the true digest."""
        self.worst = 0.0
        """Largest error so far in this walk, relative to the larger of the stream before and after each step."""
        self.eps = torch.finfo(torch.float32).eps
        self.position = -1
        self._first: Digest | None = None
        """Digest of the stream that the lowest function reads, which is rebuilt over the longest distance."""
        self._parts: _parts.Parts | None = None
        """Larger sample of the same stream, in a run that compares its parts."""
        self._read: Any = None
        """Function that reads a usual stream at an address: contiguous, with `_numel` elements of type `_dtype`."""
        self._numel, self._dtype, self._every = -1, torch.float32, slice(None)

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Digest the stream that half-block `index` updates, if it will be rebuilt."""
        if -1 < run.lowest < index:
            x = streams[half_block.target]
            if x.dtype is self._dtype and x.numel() == self._numel and x.is_contiguous():
                self.before[index] = self._read(x.data_ptr())[self._every]
            else:
                self.before[index] = digest_of(x)
        elif index == run.lowest:
            source = streams[half_block.source]
            self._first = digest_of(source)
            if run.chain.chain.num_runs % PARTS_INTERVAL == 1:
                self._parts = _parts.parts_of(source)
            self.eps = torch.finfo(source.dtype).eps
            self._read, self._every = reader_of(source.dtype, source.numel())
            self._numel = source.numel() if self._read and source.device.type == "cpu" else -1
            self._dtype = source.dtype
        if index >= len(run.chain.chain.half_blocks) - len(streams):
            self.final[half_block.target] = digest_of(y)

    def on_hold(self, streams: Sequence[Tensor | None], whole: Tensor | None) -> None:
        """Store the checksums and versions of the final streams, or of the output that they are parts of."""
        held = [tensor for tensor in streams if tensor is not None] if whole is None else [whole]
        self._checksums = [(tensor, checksum(tensor), tensor._version) for tensor in held]

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Raise if a final stream was overwritten without raising its version."""
        checksums, self._checksums = self._checksums, []  # They refer to the streams, which must be freed.
        for tensor, expected, version in checksums:  # Other versions raise on reading.
            if expected is not None and tensor._version == version and checksum(tensor) not in (expected, None):
                raise _careful.overwritten_output(tensor)

    def after_undo(self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: StreamSnapshot) -> None:
        """Raise if the rebuilt stream differs from the original; at the lowest half-block, check its drift."""
        expected, target = self.before.get(index), half_block.target
        x = streams.held[target]
        if expected is not None and x is not None:
            if x.dtype is self._dtype and x.numel() == self._numel and x.is_contiguous():
                digest = self._read(x.data_ptr())[self._every]
            else:
                digest = digest_of(x)
            if index >= self.position:  # A new walk, from true streams.
                self.worst, self.sizes, self.errors = 0.0, [0.0] * (count := len(streams.strides)), [0.0] * count
            self.position = index
            # The sum was rounded at the size of the larger of the two: the stream before or after.
            scale = max(size := math.hypot(*expected), self.sizes[target])
            inherited, error = self.errors[target], 0.0 if digest == expected else math.dist(digest, expected)
            self.sizes[target], self.errors[target] = size, error
            if error:
                of_read = 0.0 if type(s := half_block.source) is tuple else self.errors[s] / (self.sizes[s] or math.inf)
                usual = max(scale * max(self.worst, of_read, _FLOOR[x.dtype]), inherited)
                if not error <= _suspicion.SUSPICIOUS * usual or half_block.coupling.is_exact:
                    ratio = error / usual if usual else math.inf
                    _suspicion.look_closer(self, run, index, streams, digest, expected, ratio, inherited)
                self.worst = max(self.worst, error / (scale or math.inf))
        if self._first is not None and index == run.lowest + 1:
            self._judge(run, run.steps[run.lowest].half_block, streams)

    def _judge(self, run: "Rebuilder", half_block: HalfBlock, streams: StreamSnapshot) -> None:
        """Check, once, the drift of the stream that the lowest function is about to read again."""
        source, first = streams.read(half_block.source), self._first
        assert first is not None
        self._first, of_part, digest = None, 0.0, digest_of(source)
        # An error that is tiny relative to the other stream must not count as infinite where this stream is zero.
        floor = max(starmap(math.hypot, self.final.values())) * self.eps**0.5
        error = math.dist(digest, first) / (math.hypot(*first) or floor or math.inf)
        if self._parts is not None:
            error, of_part = _parts.relative_errors(source, self._parts, floor / max(1, len(first)) ** 0.5)
        bound = 0.0 if half_block.coupling.is_exact else WARN_ABOVE.get(source.dtype, 0.0)
        if not (max(error, of_part / PART) <= bound and math.isfinite(sum(digest))):
            report_drift(self, run, half_block, source.dtype, digest, first, error, of_part)

    def after_fill(self, run: "Rebuilder", index: int, streams: StreamSnapshot) -> None:
        """Compare tensors that the lowest function saved, since its result is not compared."""
        tail, source = run.steps[index].tail, run.steps[index].half_block.source
        assert tail is not None
        ratio = tail.error / max(self.worst, self.relative_error(source), 4 * self.eps)
        if not ratio <= _suspicion.SUSPICIOUS:
            _suspicion.look_closer(self, run, index, streams, tail.actual, tail.expected, ratio, is_tail=True)
        if tail.suspects:
            _suspicion.check_repeats(run, index, streams)

    def relative_error(self, source: Any) -> float:
        """Return the current relative error of a stream; 0 if it has not been undone yet, and for a sum of streams."""
        return self.errors[source] / (self.sizes[source] or math.inf) if self.sizes and type(source) is int else 0.0

    def after_backward(self, run: "Rebuilder") -> None:
        """Start a new walk in the next backward pass of a retained graph."""
        self.position = -1
