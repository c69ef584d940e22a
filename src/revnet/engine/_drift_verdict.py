"""Judge the error of a rebuilt stream: warn if it is too large, and raise if the stream became NaN or inf."""

import math
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revnet.engine._chain import HalfBlock
from revnet.errors import ReconstructionError, ReconstructionWarning

if TYPE_CHECKING:
    from revnet.engine._agreement import AgreementWatch
    from revnet.engine._rebuild import Rebuilder


@dataclass(frozen=True, slots=True)
class StreamKind:
    """Properties of a rebuilt stream, apart from its error."""

    name: str
    """Name of the function that reads it."""
    dtype: torch.dtype
    is_exact: bool
    """Whether its coupling is exact."""
    is_mixed: bool
    """Whether functions compute in low precision under autocast, which amplifies rounding."""
    way_out: str
    """What a user can do about its drift."""

    @property
    def warn_above(self) -> float:
        """Relative error above which users are warned."""
        if self.is_exact:
            return 0.0
        return 1e-2 if self.is_mixed else WARN_ABOVE.get(self.dtype, 1e-2)


def kind_of(run: "Rebuilder", half_block: HalfBlock, dtype: torch.dtype) -> StreamKind:
    """Return the properties of the stream that a half-block reads."""
    is_mixed, way_out = run.surroundings.is_mixed, run.chain.way_out or _WAY_OUT
    return StreamKind(half_block.name, dtype, half_block.coupling.is_exact, is_mixed, way_out)


WARN_ABOVE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-3, torch.complex64: 1e-3}
"""Thresholds by dtype: about ten times the error of 256 blocks at initialization, and far below an error that visibly
changes a gradient.
"""


PART = 100.0
"""Factor by which the error of a part may exceed the threshold: there are many parts, and in most networks some are
small."""


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """An error that is known when the device has computed it."""

    function: "weakref.ref[nn.Module]"
    """Function that reads the stream."""
    kind: StreamKind
    """The stream."""
    error: Tensor
    """Relative error of the stream."""
    totals: Tensor
    """Sums of all elements of the rebuilt stream and of the final streams; finite if every element is."""


PENDING: "deque[tuple[torch.cuda.Event, Verdict]]" = deque()
"""Verdicts that wait for a GPU."""
_lock = threading.Lock()
# Weak: a record of warnings must not keep a model alive.
_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def judge(verdict: Verdict) -> None:
    """Report an error: at once on the CPU, and on a GPU when its work is done, so that nothing waits."""
    if verdict.error.is_cuda:
        event = torch.cuda.Event()
        event.record()
        PENDING.append((event, verdict))
    else:
        _report(verdict)


def report_pending() -> None:
    """Report the errors that a GPU has computed by now."""
    # Querying an event while a CUDA graph is captured would make the capture fail.
    while PENDING and not torch.cuda.is_current_stream_capturing():
        # Queried and removed in one step; otherwise another thread may remove it in between.
        with _lock:
            verdict = PENDING.popleft()[1] if PENDING and PENDING[0][0].query() else None
        if verdict is None:
            return
        # Outside of the lock: a warning may run user code, which may call this function again.
        _report(verdict)


def _report(verdict: Verdict) -> None:
    rebuilt, *true = verdict.totals.tolist()
    # `tolist` gives a number; `float` would be one more operation than a prediction of the step has.
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
    """Warn, once for each function, about a rebuilt stream whose error is too large.

    Args:
        function: The function that reads the stream; None if it no longer exists.
        kind: The stream.
        error: The relative error of the stream.
        of_part: The largest relative error of a channel, a token or a sample of the batch.
        is_finite: Whether all elements of the stream are finite.
        was_finite: Whether the final streams are finite, so that all true streams were.

    Raises:
        ReconstructionError: The stream contains NaN or inf, and did not in the forward pass.
    """
    name = kind.name
    if not was_finite:
        return  # The model produced them, with or without reversal.
    if not is_finite:
        raise ReconstructionError(
            f"the stream that `{name}` reads contains NaN or inf when it is rebuilt, but did not in the forward pass: "
            f"undoing the blocks after it amplifies rounding without bound. {kind.way_out}"
        )
    where = ""
    if error <= kind.warn_above < of_part / PART:
        error, where = of_part, " in one of its channels, tokens or samples, which a function may normalize"
    if function is None or function in _warned or error <= kind.warn_above:
        return
    _warned.add(function)
    if kind.is_exact:
        message = (
            f"the stream that `{name}` reads was rebuilt with a relative error of {error:.1g}, although its coupling "
            "is exact: a residual function returns different numbers when it runs again. Set "
            "`torch.use_deterministic_algorithms(True)`, or find the function with "
            "`revnet.numerics.find_nondeterministic(model, x)`."
        )
    else:
        low = kind.dtype in (torch.bfloat16, torch.float16)
        message = (
            f"the stream that `{name}` reads was rebuilt with a relative error of {error:.1g}{where}, so gradients "
            f"are off by at least as much. {_FLOAT32 if low else ''}{kind.way_out}"
        )
    warnings.warn(message, ReconstructionWarning, stacklevel=2)


def report_drift(
    watch: "AgreementWatch",
    run: "Rebuilder",
    half_block: HalfBlock,
    dtype: torch.dtype,
    digest: Sequence[float],
    error: float,
    of_part: float,
) -> None:
    """Report the errors that an `AgreementWatch` measured of the stream that the lowest half-block reads; see `report`.

    Args:
        watch: Has the digests of the true streams.
        run: The run.
        half_block: The lowest half-block.
        dtype: The dtype of the stream.
        digest: A sample of the rebuilt stream.
        error: Its relative error.
        of_part: The largest relative error of a part.
    """
    # NaN and inf stay in a stream to its end. If no sample contains any, the model did not produce them.
    is_finite = math.isfinite(sum(digest))
    was_finite = is_finite or math.isfinite(sum(map(sum, (*watch.final.values(), *watch.before.values()))))
    kind = kind_of(run, half_block, dtype)
    report(half_block.function, kind, error, of_part, is_finite=is_finite, was_finite=was_finite)


def warn_of_low_precision(half_block: HalfBlock, stream: Tensor) -> None:
    """Warn, once, that streams of 16 bits can hardly be rebuilt."""
    function, dtype = half_block.function, stream.dtype
    if dtype not in (torch.bfloat16, torch.float16) or function in _warned:
        return
    _warned.add(function)
    warnings.warn(
        f"the streams that begin at `{half_block.name}` are {dtype}, so undoing each block adds an error of "
        f"{torch.finfo(dtype).eps / 2:.1g} or more to them, and to the gradients. {_FLOAT32}{_WAY_OUT}",
        ReconstructionWarning,
        stacklevel=2,
    )


_WAY_OUT = (
    "Bound the error with `tolerance=1e-3` in the ReversibleSequential, reverse exactly with `FixedPoint()` couplings, "
    "or find the blocks that amplify it with `revnet doctor`."
)
_FLOAT32 = (
    "Keep the streams in float32 and let autocast compute in low precision; with FSDP2, "
    "`revnet.distributed.shard_blocks` does so. "
)
