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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnet.errors import ReconstructionError, ReconstructionWarning
from revnet.functional._storage import has_values, is_plain

MOST_SAMPLED = 512
"""Elements of a sample: enough for an error to be known within some percent."""
WARN_ABOVE = 1e-2
"""The relative error of a rebuilt stream from which on users are warned."""


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


class DriftWatch:
    """The samples of one run."""

    def __init__(self) -> None:
        self._meter: DriftMeter | None = getattr(_active, "meter", None)
        self._samples: dict[int, Tensor] = {}
        self._first: int | None = None
        self._magnitudes: list[Tensor] = []
        _tell_pending()

    def keep(self, index: int, source: Tensor) -> None:
        """Sample what function `index` reads, if it will be compared; the first one always is."""
        is_first = self._first is None
        if (is_first or self._meter is not None) and _can_sample(source):
            self._samples[index] = sample(source)
        if is_first:
            self._first = index
            self._note_magnitude(source)

    def begin(self, streams: Sequence[Tensor | None]) -> None:
        """Note, before anything is rebuilt, whether the forward pass ended well."""
        for stream in streams:
            if stream is not None:
                self._note_magnitude(stream)

    def _note_magnitude(self, stream: Tensor) -> None:
        if self._first in self._samples:
            self._magnitudes.append(_magnitude(stream))

    def compare(
        self, index: int, source: Tensor, function: nn.Module, name: str, *, distance: int, is_exact: bool
    ) -> None:
        """Compare what function `index` reads again; once.

        Args:
            index: The function's place in the run.
            source: What it reads, rebuilt.
            function: The function.
            name: Its name, for errors.
            distance: Half-blocks from there to the nearest stream that was kept.
            is_exact: Whether the coupling promises that nothing is lost.

        Raises:
            ReconstructionError: NaN or inf is in it that was not there in the forward pass.
        """
        true = self._samples.pop(index, None)
        if true is None:
            return
        error = relative_error(sample(source), true)
        if self._meter is not None:
            self._meter.records.append(DriftRecord(function, name, distance, error, source.dtype))
        if index == self._first and not (self._meter is not None and self._meter.is_quiet):
            largest = torch.stack([_magnitude(source), *self._magnitudes])
            if has_values(source):
                _judge(_Verdict(weakref.ref(function), name, source.dtype, is_exact, error, largest))


def sample(x: Tensor) -> Tensor:
    """A few hundred elements, evenly spread over all dimensions, as a copy."""
    return x.detach()[_grid(x.shape)].clone()


@cache
def _grid(shape: torch.Size) -> tuple[slice, ...]:
    """Steps along each dimension, such that few enough elements remain; samples of a batch are thinned out last."""
    steps = [1] * len(shape)

    def left(dim: int) -> int:
        return -(-shape[dim] // steps[dim])

    dims = [*range(1, len(shape)), 0] if len(shape) > 1 else list(range(len(shape)))
    while torch.Size(map(left, range(len(shape)))).numel() > MOST_SAMPLED:
        widest = max(dims, key=left)
        steps[widest] += 1
    return tuple(slice(None, None, step) for step in steps)


def relative_error(rebuilt: Tensor, true: Tensor) -> Tensor:
    """The distance in relation to the true sample; 0 where both are 0, NaN where the rebuilt one is not finite."""
    dtype = torch.promote_types(true.dtype, torch.float32)
    true = true.to(dtype)
    tiny = torch.finfo(true.real.dtype if true.is_complex() else dtype).tiny
    return torch.linalg.vector_norm(rebuilt.to(dtype) - true) / torch.linalg.vector_norm(true).clamp_min(tiny)


# The verdict ----------------------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    function: "weakref.ref[nn.Module]"
    name: str
    dtype: torch.dtype
    is_exact: bool
    error: Tensor
    largest: Tensor
    """The largest elements, of the rebuilt stream, and of streams as the forward pass had them."""


_pending: "deque[tuple[torch.cuda.Event, _Verdict]]" = deque()
_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def _judge(verdict: _Verdict) -> None:
    """Tell what is wrong: at once on the CPU, on a GPU when its work is done, so that nobody waits for it."""
    if verdict.error.is_cuda:
        event = torch.cuda.Event()
        event.record()
        _pending.append((event, verdict))
    else:
        _tell(verdict)


def _tell_pending() -> None:
    while _pending and not torch.cuda.is_current_stream_capturing() and _pending[0][0].query():
        _tell(_pending.popleft()[1])


def _tell(verdict: _Verdict) -> None:
    rebuilt, *true = verdict.largest.tolist()
    if not all(map(math.isfinite, true)):
        return  # The model's own, with or without reversal.
    if not math.isfinite(rebuilt):
        raise ReconstructionError(
            f"the stream that `{verdict.name}` reads holds {'NaN' if math.isnan(rebuilt) else 'inf'} when it is "
            f"rebuilt, and did not in the forward pass: undoing the blocks behind it amplifies rounding without bound. "
            f"{_WAY_OUT}"
        )
    # A number; `float` would be an operation more than a prediction of the step has.
    error: Any = verdict.error.tolist()
    function = verdict.function()
    if function is None or function in _warned or error <= (0 if verdict.is_exact else WARN_ABOVE):
        return
    _warned.add(function)
    if verdict.is_exact:
        message = (
            f"the stream that `{verdict.name}` reads was rebuilt with a relative error of {error:.1g}, though its "
            "coupling is exact: a residual function gives other numbers when it runs again. Set "
            "`torch.use_deterministic_algorithms(True)`; `revnet.numerics.find_nondeterministic(model, x)` names it."
        )
    else:
        low = verdict.dtype in (torch.bfloat16, torch.float16)
        message = (
            f"the stream that `{verdict.name}` reads was rebuilt with a relative error of {error:.1g}, so that "
            f"gradients are wrong by about as much. {_FLOAT32 if low else ''}{_WAY_OUT}"
        )
    warnings.warn(message, ReconstructionWarning, stacklevel=2)


_WAY_OUT = (
    "Bound the error with `tolerance=1e-3` of the ReversibleSequential, reverse exactly with `FixedPoint()` couplings, "
    "or see which blocks amplify it with `revnet doctor`."
)
_FLOAT32 = "Keep the streams in float32 and let autocast compute in low precision. "


def _magnitude(x: Tensor) -> Tensor:
    """The largest element's; NaN if there is one."""
    return torch.linalg.vector_norm(x.detach(), torch.inf)


def _can_sample(source: Tensor) -> bool:
    return (
        is_plain(source)
        and source.layout is torch.strided
        and source.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and not (source.is_cuda and torch.cuda.is_current_stream_capturing())
    )
