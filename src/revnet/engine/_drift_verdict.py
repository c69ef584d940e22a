"""Judge the error of a rebuilt stream: warn if it is too large, and raise if the stream became NaN or inf."""

import math
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """Sums of all elements of the rebuilt stream, of the sample of the true one, and of all elements of the final
    streams; finite if every element is.
    """


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
    is_finite, began_finite, *ended_finite = map(math.isfinite, verdict.totals.tolist())
    # `tolist` gives a number; `float` would be one more operation than a prediction of the step has.
    error: Any = verdict.error.tolist()
    finiteness = Finiteness(is_finite, began_finite, all(ended_finite))
    report(verdict.function(), verdict.kind, error, finiteness=finiteness)


class Finiteness(NamedTuple):
    """Whether elements of streams are finite."""

    rebuilt: bool = True
    """Elements of the rebuilt stream."""
    true: bool = True
    """Elements of the true stream, as far as it was sampled."""
    final: bool = True
    """Elements of the final streams. NaN and inf stay in a stream to its end, so if these are finite, all were."""


def report(
    function: nn.Module | None,
    kind: StreamKind,
    error: float,
    of_part: float = 0.0,
    *,
    finiteness: Finiteness,
) -> None:
    """Warn, once for each function, about a rebuilt stream whose error is too large.

    Args:
        function: The function that reads the stream; None if it no longer exists.
        kind: The stream.
        error: The relative error of the stream.
        of_part: The largest relative error of a channel, a token or a sample of the batch.
        finiteness: Whether the streams are finite.

    Raises:
        ReconstructionError: The stream contains NaN or inf, and did not in the forward pass.
    """
    name = kind.name
    if not finiteness.final:
        # The model produced them, with or without reversal.
        if finiteness.true and not finiteness.rebuilt:
            _warn(
                function,
                f"the final streams contain NaN or inf, which spread to the stream that `{name}` reads when it was "
                "rebuilt, so gradients are NaN even if the loss leaves these elements out. Mask them in the function "
                "that produces them, or store the activations of its block with the policy `Store()`.",
            )
        return
    if not finiteness.rebuilt:
        raise ReconstructionError(
            f"the stream that `{name}` reads contains NaN or inf when it is rebuilt, but did not in the forward pass: "
            f"undoing the blocks after it amplifies rounding without bound. {kind.way_out}"
        )
    where = ""
    if error <= kind.warn_above < of_part / PART:
        error, where = of_part, " in one of its channels, tokens or samples, which a function may normalize"
    if error <= kind.warn_above:
        return
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
    _warn(function, message)


def _warn(function: nn.Module | None, message: str) -> None:
    if function is not None and function not in _warned:
        _warned.add(function)
        warnings.warn(message, ReconstructionWarning, stacklevel=3)


def report_drift(
    watch: "AgreementWatch",
    run: "Rebuilder",
    half_block: HalfBlock,
    dtype: torch.dtype,
    digest: Sequence[float],
    true: Sequence[float],
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
        true: The same sample of the true stream.
        error: Its relative error.
        of_part: The largest relative error of a part.
    """
    # If no sample contains NaN or inf, the model did not produce them.
    is_finite = math.isfinite(sum(digest))
    is_final_finite = is_finite or math.isfinite(sum(map(sum, (*watch.final.values(), *watch.before.values()))))
    # Each stream at the start, after the lowest half-block; NaN in an input of the model spreads in both directions.
    first = [watch.before.get(run.lowest + 1 + number, ()) for number in range(len(watch.final))]
    finiteness = Finiteness(is_finite, math.isfinite(sum(map(sum, (true, *first)))), is_final_finite)
    report(half_block.function, kind_of(run, half_block, dtype), error, of_part, finiteness=finiteness)


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
