"""Keyframes: positions at which a run holds a pair of streams, so that the streams rebuilt between them stay accurate.

In the backward pass, the input of each function is compared with a sample from the forward pass before it is used. If
the error is too large, the run goes forward again from the nearest exact pair, and continues with exact streams. That
position becomes a keyframe: the next forward pass holds the pair there, and nothing has to be computed twice.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from revnet.engine._chain import HalfBlock
from revnet.engine._drift import DriftWatch
from revnet.engine._observer import Observer
from revnet.engine._retained import fork, snapshot_of
from revnet.engine._streams import StreamSnapshot
from revnet.engine._tensors import has_values
from revnet.errors import ReconstructionError, ReconstructionWarning

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder

_INTERVAL = 100
"""Number of passes after which keyframes are placed again."""
_PLACE_ABOVE = 0.25
_BROKEN_ABOVE = 0.5
"""Fractions of the tolerance. A sample gives only an estimate of the error, so the error must stay well below the
tolerance. Keyframes are placed with a margin, so that they need not move at every step.
"""


class ToleranceKeeper:
    """Keeps the reconstruction error of runs below a bound, and stores their keyframes.

    Args:
        tolerance: The bound on the relative error of a rebuilt stream.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.keyframes: frozenset[str] = frozenset()
        """Names of the half-blocks before which the pair of streams is held."""
        self._num_passes: dict[str, int] = {}
        self._has_warned = False

    def state(self) -> dict[str, Any]:
        """Return its state as plain values, from which another keeper can continue."""
        return {
            "keyframes": sorted(self.keyframes),
            "num_passes": dict(self._num_passes),
            "has_warned": self._has_warned,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state` returned."""
        self.keyframes = frozenset(state["keyframes"])
        self._num_passes = dict(state["num_passes"])
        self._has_warned = state["has_warned"]

    def begin(self, first_name: str) -> bool:
        """Count a pass through the chain with that first half-block; return whether it places its keyframes again."""
        # By chain: a sequence with several policies has several chains, and one keeper.
        count = self._num_passes.get(first_name, 0)
        self._num_passes[first_name] = count + 1
        return count % _INTERVAL == 0

    def exceeds(self, error: float, *, is_calibrating: bool) -> bool:
        """Return whether a sampled error is too large. NaN counts as too large."""
        return not error <= self.tolerance * (_PLACE_ABOVE if is_calibrating else _BROKEN_ABOVE)

    def forget(self, names: set[str]) -> None:
        """Remove keyframes, which are then placed again."""
        self.keyframes -= names

    def add_keyframe(self, name: str) -> None:
        """Add a keyframe before the half-block of that name."""
        self.keyframes |= {name}

    def warn_single_step(self, name: str, error: float) -> None:
        """Warn, once, that a single half-block exceeds the bound."""
        if self._has_warned:
            return
        self._has_warned = True
        size = "NaN" if math.isnan(error) else f"{error:.1g}"
        warnings.warn(
            f"undoing `{name}` alone has a relative error of {size}, too close to the tolerance of {self.tolerance:g} "
            "or above it, so its stream is stored instead of rebuilt, as for any other function of this kind; keep the "
            "streams in a higher precision, use `FixedPoint()`, or see why it amplifies rounding with `revnet doctor`.",
            ReconstructionWarning,
            stacklevel=2,
        )


class ToleranceWatch(Observer):
    """Observer that keeps the streams of one run within the tolerance.

    Args:
        keeper: Has the bound and the keyframes.
        first_name: The name of the run's first function.
        drift: Has samples of the inputs of all functions.
        has_values: Whether the streams have values; a prediction on fake tensors has none.
    """

    looks_before_replays = True

    def __init__(self, keeper: ToleranceKeeper, first_name: str, drift: DriftWatch, *, has_values: bool):
        self._keeper: ToleranceKeeper | None = keeper
        self._drift = drift
        # A prediction on fake tensors does not count as a pass, and must not use up the pass that places keyframes.
        self._is_calibrating = has_values and keeper.begin(first_name)
        self._references: list[StreamSnapshot] = []
        """Exact streams from which the run can go forward again; the first is the lowest that is needed."""

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Hold the streams before half-block `index` if they are the lowest ones needed, or if there is a keyframe."""
        if index == run.lowest:
            self._references = [snapshot_of(index, streams)]
        elif (
            run.lowest >= 0
            and self._keeper is not None
            # While keyframes are placed again, the old ones must not hide the errors that show where new ones belong.
            and not self._is_calibrating
            and half_block.name in self._keeper.keyframes
        ):
            run.keyframes.append(snapshot_of(index, streams))

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Remove the keyframes if this pass places them again."""
        if self._keeper is not None and self._is_calibrating:
            self._keeper.forget({step.half_block.name for step in run.steps})

    def before_replay(self, run: "Rebuilder", index: int, streams: StreamSnapshot, distance: int) -> None:
        """Replace the streams by exact ones if the error of the input of function `index` is too large."""
        keeper, source = self._keeper, run.steps[index].half_block.source
        # The walk goes down, so the references above are no longer needed. All others can be computed from the lowest.
        self._references = [
            reference for reference in self._references if reference.position <= index + 1
        ] or self._references[:1]
        if keeper is None:
            return
        error = self._drift.error_of(index, streams.read(source))
        if error is None or not has_values(error):
            return
        if not keeper.exceeds(float(error), is_calibrating=self._is_calibrating):
            return
        position = index + 1
        name = run.steps[position].half_block.name
        is_alone = streams.origin - position == 1  # Computed before `streams` changes.
        true = self._recompute_streams(run, position)
        # In place: the run continues its walk with this snapshot.
        streams.position, streams.origin, streams.strides = true.position, true.origin, true.strides
        streams.held, streams.versions = true.held, true.versions
        true_error = float(self._drift.error_of(index, streams.read(source)))  # type: ignore[arg-type]
        if math.isnan(true_error):  # The model produced NaN; no keyframe helps.
            self._keeper = None
        elif true_error > 0 and keeper.exceeds(true_error, is_calibrating=False):
            raise ReconstructionError(
                f"the stream before `{name}` has a relative error of {true_error:.1g} although it was computed as in "
                "the forward pass: a residual function returns different numbers when it runs again. Set "
                "`torch.use_deterministic_algorithms(True)`, or find the function with "
                "`revnet.numerics.find_nondeterministic`."
            )
        else:
            keeper.add_keyframe(name)
            if is_alone:
                keeper.warn_single_step(name, float(error))
            if streams is not run.held:  # The graph is retained: the next walk starts here.
                # In order: `streams_for` takes the first keyframe that is not below the half-block.
                below = [keyframe for keyframe in run.keyframes if keyframe.position <= position]
                run.keyframes = [*below, fork(streams), *run.keyframes[len(below) :]]

    def after_backward(self, run: "Rebuilder") -> None:
        """Release all references except the first."""
        # The first reference is needed if a retained graph is walked a second time.
        del self._references[1:]

    def _recompute_streams(self, run: "Rebuilder", position: int) -> StreamSnapshot:
        """Return the exact streams at `position`, computed forward from the nearest exact streams below."""
        below = [reference for reference in (*self._references, *run.keyframes) if reference.position <= position]
        # A fork: the run walks it back in place, and the reference stays exact.
        streams = fork(max(below, key=lambda reference: reference.position))
        # References on the way, which may be needed next: few, but near enough to start from.
        spacing = max(1, math.isqrt(position - streams.position))
        while streams.position < position:
            step = run.steps[streams.position]
            y, target = step.redo(run, streams), step.half_block.target
            moved = [y if number == target else streams.read(number) for number in range(len(streams.strides))]
            streams = snapshot_of(streams.position + 1, moved)
            if streams.position < position and (position - streams.position) % spacing == 0:
                self._references.append(streams)
        return streams
