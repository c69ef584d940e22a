"""Measure how far rebuilt streams are from the true ones.

The forward pass samples the streams that residual functions read, a few hundred elements each. When the backward pass
has rebuilt a stream, the same elements are compared. This is always done for the first function of a run, whose input
is rebuilt over the longest distance. It costs a few kilobytes, and gives a warning before wrong gradients go unnoticed.
Under a `DriftMeter`, it is done for every function, by name.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import judged_dims
from revnet.engine._chain import HalfBlock
from revnet.engine._drift_verdict import PART, PENDING, Verdict, judge, kind_of, report_pending
from revnet.engine._observer import Observer
from revnet.engine._streams import StreamSnapshot
from revnet.engine._tensors import has_values, is_plain

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder

MOST_SAMPLED = 512
"""Maximum number of elements of a sample; enough to know an error to within a few percent."""


@dataclass(frozen=True, slots=True, eq=False)
class DriftRecord:
    """One residual function, and the error of its rebuilt input."""

    function: nn.Module
    name: str
    distance: int
    """Number of half-blocks between the function and the nearest stream that was kept."""
    error: Tensor
    """Relative error, in the Euclidean norm of the sample: a scalar on the stream's device, which need not be read at
    once."""
    dtype: torch.dtype
    """Dtype of the stream."""


class DriftMeter:
    """Collects the drift of the forward passes that begin inside `with meter.on():`, and of their backward passes.

    Nothing waits for the device until the records are read.

    Args:
        is_quiet: If true, errors are only recorded; the run neither warns nor raises.
    """

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self.records: list[DriftRecord] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Record the forward passes of this thread until the context exits."""
        before = getattr(_active, "meter", None)
        _active.meter = self
        try:
            yield
        finally:
            _active.meter = before


_active = threading.local()


active_meter: Callable[[], DriftMeter | None] = partial(getattr, _active, "meter", None)
"""Function that returns the meter of this thread, or None. A partial, so that the lookup makes no Python call."""


@contextmanager
def unmetered() -> Iterator[None]:
    """Hide the meter of this thread until the context exits, from steps that are only counted."""
    before = getattr(_active, "meter", None)
    _active.meter = None
    try:
        yield
    finally:
        _active.meter = before


def meter_is_quiet() -> bool:
    """Return whether a quiet `DriftMeter` is on in this thread."""
    meter = active_meter()
    return meter is not None and meter.is_quiet


class DriftWatch(Observer):
    """Observer of one run that compares samples of the inputs of functions with their rebuilt inputs.

    Args:
        keeps_all: Whether to sample the input of every function, and compare it whenever it is rebuilt. Otherwise, only
            the input of the first function is compared, once; under a `DriftMeter`, all of them are.
    """

    looks_before_replays = True

    def __init__(self, *, keeps_all: bool = False) -> None:
        self._meter: DriftMeter | None = getattr(_active, "meter", None)
        self._keeps_all = keeps_all
        self._samples: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._totals: list[Tensor] = []
        self._floor: Tensor | None = None
        # Verdicts of earlier steps that wait for a GPU are probably ready by now.
        if PENDING:
            report_pending()

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Sample the input of function `index` if it will be compared, as the lowest one always is."""
        if index == run.lowest or (run.lowest >= 0 and (self._keeps_all or self._meter is not None)):
            source = streams[half_block.source]
            if _can_sample(source):
                self._samples[index] = sample(source)

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Compute the magnitude of the final streams.

        NaN and inf stay in a stream to its end, so if the final streams have none, no stream had any.
        """
        # A released run has computed it from the true streams.
        if not self._samples or self._totals or run.held is None:
            return
        for stream in run.held.held:
            if stream is not None and _can_sample(stream):
                self._totals.append(_total(stream))
                floor = _root_mean_square(sample(stream)) * torch.finfo(stream.dtype).eps ** 0.5
                self._floor = floor if self._floor is None else torch.maximum(self._floor, floor)

    def before_replay(self, run: "Rebuilder", index: int, streams: StreamSnapshot, distance: int) -> None:
        """Record, once, the error of the rebuilt input of function `index`; check the error of the lowest.

        Raises:
            ReconstructionError: The input contains NaN or inf, and did not in the forward pass.
        """
        if self._keeps_all and self._meter is None:
            return  # The tolerance has already checked each error.
        if index in self._seen or index not in self._samples:  # Seen: the graph was retained, and is walked again.
            return
        self._seen.add(index)
        half_block = run.steps[index].half_block
        source = streams.read(half_block.source).detach()
        # Under a tolerance, the sample is needed again when a retained graph is walked again.
        true = self._samples[index] if self._keeps_all else self._samples.pop(index)
        error = relative_error(sample(source), true, self._floor)
        function, name = half_block.function, half_block.name
        if self._meter is not None:
            self._meter.records.append(DriftRecord(function, name, distance, error, source.dtype))
        if index == run.lowest and has_values(source) and not (self._meter is not None and self._meter.is_quiet):
            totals = torch.stack([_total(source), _total(true), *self._totals])
            kind = kind_of(run, half_block, source.dtype)
            # Weak: a verdict may wait in `_pending` longer than the model lives.
            judge(Verdict(weakref.ref(function), kind, error, totals))

    def error_of(self, index: int, source: Tensor) -> Tensor | None:
        """Return the relative error of the rebuilt input of function `index`, or None without a sample.

        A channel, a token, or a sample of the batch also counts, with a hundredth of its own error.
        """
        true = self._samples.get(index)
        if true is None:
            return None
        rebuilt = sample(source)
        error, of_part = relative_error(rebuilt, true, self._floor), _largest_part_error(rebuilt, true)
        return error if of_part is None else torch.maximum(error, of_part / PART)


def sample(x: Tensor) -> Tensor:
    """Return a copy of a few hundred elements, evenly spread over all dimensions."""
    # A copy: a slice is a view, which would keep the whole stream alive.
    return x.detach()[_grid(x.shape)].clone()


@lru_cache(maxsize=256)
def _grid(shape: torch.Size) -> tuple[slice, ...]:
    """Return the step of a sample along each dimension; for images, channels are thinned out last."""
    steps = [1] * len(shape)

    def left(dim: int) -> int:
        return -(-shape[dim] // steps[dim])

    dims = [*range(1, len(shape)), 0] if len(shape) > 1 else list(range(len(shape)))
    groups = [[*range(2, len(shape))], [0], dims] if len(shape) > 3 else [dims]
    while torch.Size(map(left, range(len(shape)))).numel() > MOST_SAMPLED:
        group = next((group for group in groups if max(map(left, group)) > 2), dims)
        steps[max(group, key=left)] *= 2
    return tuple(slice(None, None, step) for step in steps)


def relative_error(rebuilt: Tensor, true: Tensor, floor: Tensor | None = None) -> Tensor:
    """Return the distance between two samples relative to the true one; NaN if the rebuilt one is not finite.

    Args:
        rebuilt: A sample of a stream.
        true: The true values of the same elements.
        floor: Root mean square to use for a true sample that is zero. Rounding that is negligible compared with the
            other stream must not count as infinite there.
    """
    dtype = _wide(true)
    true = true.to(dtype)
    size = torch.linalg.vector_norm(true)
    if floor is not None:
        # A small stream is lost next to a large one, and so are the gradients that depend on it.
        size = torch.where(size > 0, size, floor * true.numel() ** 0.5)
    # 0 / 0 would be NaN, which represents a stream that is not finite.
    return torch.linalg.vector_norm(rebuilt.to(dtype) - true) / size.clamp_min(torch.finfo(size.dtype).tiny)


def _largest_part_error(rebuilt: Tensor, true: Tensor) -> Tensor | None:
    """Return the largest relative error of a channel, token or sample of the batch; None if they have too few elements.

    A part that is zero throughout is skipped, because any rounding of the other stream would count as infinite.
    """
    dtype = _wide(true)
    differences, squares = (rebuilt.to(dtype) - true.to(dtype)).abs().square(), true.to(dtype).abs().square()
    largest: Tensor | None = None
    for dim in judged_dims(true.shape, true.numel(), _LEAST_OF_PART):
        others = [other for other in range(true.dim()) if other != dim]
        sizes, errors = squares.sum(others), differences.sum(others)
        # An `if` would wait for the device.
        of_dim = torch.where(sizes > 0, errors / sizes, torch.zeros_like(sizes)).amax()
        largest = of_dim if largest is None else torch.maximum(largest, of_dim)
    return None if largest is None else largest.sqrt()


_LEAST_OF_PART = 8
"""Minimum number of sampled elements for a part to be compared; samples on a device are smaller than on the host."""


def _total(x: Tensor) -> Tensor:
    """Return the sum of all elements, which shows whether all are finite, and is faster than checking each of them."""
    x = x.detach()
    if x.is_complex():
        # `view_as_real` rejects a lazy conjugate.
        x = torch.view_as_real(x.resolve_conj())
    # In float32 at least, because a sum in float16 overflows, and finite elements would look infinite.
    return x.sum(dtype=torch.promote_types(x.dtype, torch.float32))


def _root_mean_square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.to(_wide(x))) / x.numel() ** 0.5


def _wide(x: Tensor) -> torch.dtype:
    """Return a dtype in which squares of the elements of `x` neither overflow nor vanish."""
    # MPS has no float64.
    return torch.promote_types(x.dtype, torch.float32 if x.device.type == "mps" else torch.float64)


def _can_sample(source: Tensor) -> bool:
    return (
        is_plain(source)
        and source.layout is torch.strided
        and source.numel() > 0
        and not in_functorch_transform()
        and not (source.is_cuda and torch.cuda.is_current_stream_capturing())
    )
