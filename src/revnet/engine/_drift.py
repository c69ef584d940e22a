"""How far rebuilt streams are from the true ones.

The forward pass keeps a sample of what residual functions read, some hundred elements; when the backward pass has
rebuilt it, the same elements are compared. Always for the first function of a run, whose input has come the longest
way back: that costs a few kilobytes, and warns before wrong gradients go unnoticed. For every function, by name, under
a `DriftMeter`.
"""

import math
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import judged_dims
from revnet.engine._chain import HalfBlock
from revnet.engine._observer import Observer
from revnet.engine._streams import StreamSnapshot
from revnet.engine._tensors import has_values, is_plain
from revnet.errors import ReconstructionError, ReconstructionWarning

if TYPE_CHECKING:
    from revnet.engine._agreement import AgreementWatch
    from revnet.engine._rebuild import Rebuilder

MOST_SAMPLED = 512
"""Elements of a sample: enough for an error to be known within some percent."""


class DriftRecord(NamedTuple):
    """One residual function, and how far what it read again was from what it read the first time."""

    function: nn.Module
    name: str
    distance: int
    """Half-blocks between it and the nearest stream that was kept."""
    error: Tensor
    """Relative, by the Euclidean norm of the sample; a number on the stream's device, not to be waited for at once."""
    dtype: torch.dtype
    """Of the stream."""


class DriftMeter:
    """Collects drift while it is on: of the forward passes that begin `with meter.on():`, and their backward passes.

    Nothing waits for the device until the records are read.

    Args:
        is_quiet: Whether what is wrong stands in the records alone, and neither warns nor raises.
    """

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self.records: list[DriftRecord] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch the forward passes of this thread, until the context is left."""
        before = getattr(_active, "meter", None)
        _active.meter = self
        try:
            yield
        finally:
            _active.meter = before


_active = threading.local()


active_meter: Callable[[], DriftMeter | None] = partial(getattr, _active, "meter", None)
"""Returns the meter that is on in this thread; a partial, so that asking makes no Python call."""


def meter_is_quiet() -> bool:
    """Return whether a quiet `DriftMeter` is on in this thread."""
    meter = active_meter()
    return meter is not None and meter.is_quiet


class DriftWatch(Observer):
    """Compares samples of what functions read with what they read again; an observer of one run.

    Args:
        keeps_all: Whether to sample what every function reads, and compare it whenever it is rebuilt; otherwise the
            first one alone, once, and all of them under a `DriftMeter`.
    """

    looks_before_replays = True

    def __init__(self, *, keeps_all: bool = False) -> None:
        self._meter: DriftMeter | None = getattr(_active, "meter", None)
        self._keeps_all = keeps_all
        self._samples: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._totals: list[Tensor] = []
        self._floor: Tensor | None = None
        # What earlier steps left to be judged on a GPU is likely to be done by now.
        if _pending:
            _report_pending()

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Sample what function `index` has read, if it will be compared; the lowest always is."""
        if index == run.lowest or (run.lowest >= 0 and (self._keeps_all or self._meter is not None)):
            source = streams[half_block.source]
            if _can_sample(source):
                self._samples[index] = sample(source)

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Note how large the final streams are.

        NaN and inf stay in a stream to its end: if these have none, no stream had.
        """
        if not self._samples or run.held is None:
            return
        for stream in run.held.held:
            if stream is not None and _can_sample(stream):
                self._totals.append(_total(stream))
                floor = _root_mean_square(sample(stream)) * torch.finfo(stream.dtype).eps ** 0.5
                self._floor = floor if self._floor is None else torch.maximum(self._floor, floor)

    def before_replay(self, run: "Rebuilder", index: int, streams: StreamSnapshot, distance: int) -> None:
        """Note how far what function `index` reads again is from what it read, once, and judge the lowest.

        Raises:
            ReconstructionError: NaN or inf is in it that was not there in the forward pass.
        """
        if self._keeps_all and self._meter is None:
            return  # Each error is judged before, by the tolerance.
        if index in self._seen or index not in self._samples:  # Seen: the graph was retained, and is gone over again.
            return
        self._seen.add(index)
        half_block = run.steps[index].half_block
        source = streams.read(half_block.source).detach()
        # Under a tolerance, the sample is needed again when a retained graph is gone over again.
        true = self._samples[index] if self._keeps_all else self._samples.pop(index)
        error = relative_error(sample(source), true, self._floor)
        function, name = half_block.function, half_block.name
        if self._meter is not None:
            self._meter.records.append(DriftRecord(function, name, distance, error, source.dtype))
        if index == run.lowest and has_values(source) and not (self._meter is not None and self._meter.is_quiet):
            totals = torch.stack([_total(source), *self._totals])
            kind = StreamKind(name, source.dtype, half_block.coupling.is_exact, run.surroundings.is_mixed)
            # Weak: a verdict may wait in `_pending` for longer than the model lives.
            _judge(_Verdict(weakref.ref(function), kind, error, totals))

    def error_of(self, index: int, source: Tensor) -> Tensor | None:
        """Return the relative error of the rebuilt input of function `index`, or None if there is no sample of it.

        A channel, token or sample of the batch counts, too, with a hundredth of its own error.
        """
        true = self._samples.get(index)
        if true is None:
            return None
        found = sample(source)
        error, of_part = relative_error(found, true, self._floor), _largest_part_error(found, true)
        return error if of_part is None else torch.maximum(error, of_part / PART)


def sample(x: Tensor) -> Tensor:
    """A few hundred elements, evenly spread over all dimensions, as a copy."""
    # A copy: a slice is a view, which would keep the whole stream.
    return x.detach()[_grid(x.shape)].clone()


@lru_cache(maxsize=256)
def _grid(shape: torch.Size) -> tuple[slice, ...]:
    """Steps along each dimension, such that few enough elements remain: of an image, channels are thinned out last."""
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
    """The distance between samples in relation to the true one; NaN where the rebuilt one is not finite.

    Args:
        rebuilt: A sample of a stream.
        true: The same elements as they were.
        floor: As how large, by its root mean square, the true sample counts at least: rounding that is nothing beside
            the other stream must not count as infinite where this one is zero.
    """
    # In float32 at least: squares of float16 overflow or vanish.
    dtype = torch.promote_types(true.dtype, torch.float32)
    true = true.to(dtype)
    size = torch.linalg.vector_norm(true)
    if floor is not None:
        size = torch.maximum(size, floor * true.numel() ** 0.5)
    # 0 / 0 would be NaN, which stands for a stream that is not finite.
    return torch.linalg.vector_norm(rebuilt.to(dtype) - true) / size.clamp_min(torch.finfo(size.dtype).tiny)


def _largest_part_error(rebuilt: Tensor, true: Tensor) -> Tensor | None:
    """The largest relative error of a channel, token or sample of the batch; None where each has too few elements.

    One that was zero throughout does not count: any rounding of the other stream would be infinitely much of it.
    """
    dtype = torch.promote_types(true.dtype, torch.float32)
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
"""Elements of a part below which it is not judged; a sample of a device has fewer than one of the host."""


def _total(x: Tensor) -> Tensor:
    """Return the sum of all elements, which shows whether each is finite faster than a look at each."""
    x = x.detach()
    if x.is_complex():
        # `view_as_real` refuses a lazy conjugate.
        x = torch.view_as_real(x.resolve_conj())
    # In float32 at least: a sum in float16 overflows, and finite elements would look infinite.
    return x.sum(dtype=torch.promote_types(x.dtype, torch.float32))


def _root_mean_square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32))) / x.numel() ** 0.5


# The verdict ----------------------------------------------------------------------------------------------------------


class StreamKind(NamedTuple):
    """What is known of a rebuilt stream before its error is."""

    name: str
    """The function that reads it."""
    dtype: torch.dtype
    is_exact: bool
    """Whether its coupling loses nothing."""
    is_mixed: bool
    """Whether functions compute in low precision under autocast, which amplifies what rounding leaves."""

    @property
    def warn_above(self) -> float:
        """The relative error from which on users are warned."""
        if self.is_exact:
            return 0.0
        return 1e-2 if self.is_mixed else WARN_ABOVE.get(self.dtype, 1e-2)


WARN_ABOVE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-3, torch.complex64: 1e-3}
"""By dtype: about ten times what 256 blocks at initialization lose, far below what changes a gradient visibly."""


PART = 100.0
"""By how much more a part may be off than the whole: there are many parts, and in most networks some are small."""


class _Verdict(NamedTuple):
    function: "weakref.ref[nn.Module]"
    kind: StreamKind
    error: Tensor
    totals: Tensor
    """The sums of all elements, finite where each of them is: of the rebuilt stream, and of the final ones."""


_pending: "deque[tuple[torch.cuda.Event, _Verdict]]" = deque()
_lock = threading.Lock()
# Weak: to have been warned of must not keep a model alive.
_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def _judge(verdict: _Verdict) -> None:
    """Report what is wrong: at once on the CPU, and on a GPU when its work is done, so that nothing waits."""
    if verdict.error.is_cuda:
        event = torch.cuda.Event()
        event.record()
        _pending.append((event, verdict))
    else:
        _report(verdict)


def _report_pending() -> None:
    # An event must not be asked while a CUDA graph is captured: the capture would fail.
    while _pending and not torch.cuda.is_current_stream_capturing():
        # Asked and taken in one step: otherwise another thread may take it in between, and this one takes the next.
        with _lock:
            verdict = _pending.popleft()[1] if _pending and _pending[0][0].query() else None
        if verdict is None:
            return
        # Outside of the lock: a warning may run the user's code, which may come here again.
        _report(verdict)


def _report(verdict: _Verdict) -> None:
    rebuilt, *true = verdict.totals.tolist()
    # A number; `float` would be an operation more than a prediction of the step has.
    error: Any = verdict.error.tolist()
    report(verdict.function(), verdict.kind, error, is_finite=math.isfinite(rebuilt), was_finite=_are_finite(true))


def _are_finite(numbers: Iterable[float]) -> bool:
    return all(map(math.isfinite, numbers))


def report(
    function: nn.Module | None,
    kind: StreamKind,
    error: float,
    of_part: float = 0.0,
    *,
    is_finite: bool = True,
    was_finite: bool = True,
) -> None:
    """Warn of a rebuilt stream whose error is too large, once for each function.

    Args:
        function: The function that reads it; None if it is gone.
        kind: The stream.
        error: Its relative error.
        of_part: The largest relative error of a channel, a token or a sample of it.
        is_finite: Whether all its elements are finite.
        was_finite: Whether those of the final streams were, and so those of all true ones.

    Raises:
        ReconstructionError: NaN or inf is in it that was not there in the forward pass.
    """
    name = kind.name
    if not was_finite:
        return  # The model's own, with or without reversal.
    if not is_finite:
        raise ReconstructionError(
            f"the stream that `{name}` reads holds NaN or inf when it is rebuilt, and did not in the forward pass: "
            f"undoing the blocks behind it amplifies rounding without bound. {_WAY_OUT}"
        )
    where = ""
    if error <= kind.warn_above < of_part / PART:
        error, where = of_part, " in one of its channels, tokens or samples, which a function may normalize"
    if function is None or function in _warned or error <= kind.warn_above:
        return
    _warned.add(function)
    if kind.is_exact:
        message = (
            f"the stream that `{name}` reads was rebuilt with a relative error of {error:.1g}, though its coupling is "
            "exact: a residual function gives other numbers when it runs again. Set "
            "`torch.use_deterministic_algorithms(True)`; `revnet.numerics.find_nondeterministic(model, x)` names it."
        )
    else:
        low = kind.dtype in (torch.bfloat16, torch.float16)
        message = (
            f"the stream that `{name}` reads was rebuilt with a relative error of {error:.1g}{where}, so that "
            f"gradients are wrong by as much or more. {_FLOAT32 if low else ''}{_WAY_OUT}"
        )
    warnings.warn(message, ReconstructionWarning, stacklevel=2)


def report_drift(
    watch: "AgreementWatch",
    run: "Rebuilder",
    half_block: HalfBlock,
    dtype: torch.dtype,
    found: Sequence[float],
    error: float,
    of_part: float,
) -> None:
    """Report what an `AgreementWatch` found of the stream that the lowest half-block reads; see `report`.

    Args:
        watch: Has the digests of the true streams.
        run: The run.
        half_block: The lowest half-block.
        dtype: Of the stream.
        found: A sample of it.
        error: Its relative error.
        of_part: The largest relative error of a part.
    """
    # NaN and inf stay in a stream to its end. If they are in none of the samples, the model did not make them.
    is_finite = math.isfinite(sum(found))
    was_finite = is_finite or math.isfinite(sum(map(sum, (*watch.final.values(), *watch.before.values()))))
    kind = StreamKind(half_block.name, dtype, half_block.coupling.is_exact, run.surroundings.is_mixed)
    report(half_block.function, kind, error, of_part, is_finite=is_finite, was_finite=was_finite)


def warn_of_low_precision(half_block: HalfBlock, stream: Tensor) -> None:
    """Say once, of streams of 16 bits, that they can hardly be rebuilt."""
    function, dtype, meter = half_block.function, stream.dtype, getattr(_active, "meter", None)
    if dtype not in (torch.bfloat16, torch.float16) or function in _warned or not has_values(stream):
        return
    if meter is not None and meter.is_quiet:
        return
    _warned.add(function)
    warnings.warn(
        f"the streams that begin at `{half_block.name}` are {dtype}, so that each block which is undone puts an error "
        f"of {torch.finfo(dtype).eps / 2:.1g} or more into them, and into gradients. {_FLOAT32}{_WAY_OUT}",
        ReconstructionWarning,
        stacklevel=2,
    )


_WAY_OUT = (
    "Bound the error with `tolerance=1e-3` of the ReversibleSequential, reverse exactly with `FixedPoint()` couplings, "
    "or see which blocks amplify it with `revnet doctor`."
)
_FLOAT32 = "Keep the streams in float32 and let autocast compute in low precision. "


def _can_sample(source: Tensor) -> bool:
    return (
        is_plain(source)
        and source.layout is torch.strided
        and source.numel() > 0
        and not in_functorch_transform()
        and not (source.is_cuda and torch.cuda.is_current_stream_capturing())
    )
