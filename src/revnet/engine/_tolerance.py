"""Keyframes: where a run holds a pair of streams, so that what it rebuilds in between stays close to what was.

In the backward pass each function's input is compared, before it is used, with a sample that the forward pass took. If
it is too far off, the run goes forward again, from the nearest pair that is true, and goes on from the truth. That
place becomes a keyframe: the next forward pass holds the pair there, and nothing has to be done twice.
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
"""Passes after which keyframes are placed again."""
_PLACE_ABOVE = 0.25
_BROKEN_ABOVE = 0.5
"""Of the tolerance. A sample knows an error but roughly, so that it may not come nearer; keyframes are placed with some
room, so that they need not move at every step."""


class ToleranceKeeper:
    """Keeps the reconstruction error of runs below a bound, and knows their keyframes.

    Args:
        tolerance: The bound on the relative error of a rebuilt stream.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.keyframes: frozenset[str] = frozenset()
        """The half-blocks before which the pair of streams is held, by their names."""
        self._num_passes: dict[str, int] = {}
        self._has_warned = False

    def state(self) -> dict[str, Any]:
        """What it has learnt so far, of plain values: with it, another guard goes on as this one would."""
        return {
            "keyframes": sorted(self.keyframes),
            "num_passes": dict(self._num_passes),
            "has_warned": self._has_warned,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.keyframes = frozenset(state["keyframes"])
        self._num_passes = dict(state["num_passes"])
        self._has_warned = state["has_warned"]

    def begin(self, first_name: str) -> bool:
        """Count a pass through the run of that first half-block; return whether it places its keyframes again."""
        # By chain: a sequence of several policies has several, and one keeper.
        count = self._num_passes.get(first_name, 0)
        self._num_passes[first_name] = count + 1
        return count % _INTERVAL == 0

    def exceeds(self, error: float, *, is_calibrating: bool) -> bool:
        """Whether a sampled error is more than is let pass; NaN is."""
        return not error <= self.tolerance * (_PLACE_ABOVE if is_calibrating else _BROKEN_ABOVE)

    def forget(self, names: set[str]) -> None:
        """Drop keyframes, which are placed again."""
        self.keyframes -= names

    def add_keyframe(self, name: str) -> None:
        """Make a keyframe before the half-block of that name."""
        self.keyframes |= {name}

    def warn_single_step(self, name: str, error: float) -> None:
        """Say, once, that one half-block alone breaks the bound."""
        if self._has_warned:
            return
        self._has_warned = True
        size = "NaN" if math.isnan(error) else f"{error:.1g}"
        warnings.warn(
            f"undoing `{name}` alone has a relative error of {size}, too near the tolerance of {self.tolerance:g} or "
            "beyond it, so that its stream is stored instead, there and wherever else it takes that; keep the streams "
            "in a higher precision, use `FixedPoint()`, or see with `revnet doctor` why it amplifies rounding.",
            ReconstructionWarning,
            stacklevel=2,
        )


class ToleranceWatch(Observer):
    """Keeps one run to the truth, as its keeper says; an observer.

    Args:
        keeper: Knows the bound, and where keyframes are.
        first_name: The name of the run's first function.
        drift: Has the samples of what each function reads.
    """

    looks_before_replays = True

    def __init__(self, keeper: ToleranceKeeper, first_name: str, drift: DriftWatch, *, has_values: bool):
        self._keeper: ToleranceKeeper | None = keeper
        self._drift = drift
        # A prediction on fake tensors is no pass, and must not use up the one that places keyframes.
        self._is_calibrating = has_values and keeper.begin(first_name)
        self._references: list[StreamSnapshot] = []
        """True streams to go forward from again; the first is the lowest that is needed."""

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Hold the streams before half-block `index` if they are the lowest ones needed, or a keyframe."""
        if index == run.lowest:
            self._references = [snapshot_of(index, streams)]
        elif (
            run.lowest >= 0
            and self._keeper is not None
            # To be placed again, keyframes must not hide the errors that show where they belong.
            and not self._is_calibrating
            and half_block.name in self._keeper.keyframes
        ):
            run.keyframes.append(snapshot_of(index, streams))

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Forget the keyframes if they are placed again in this pass."""
        if self._keeper is not None and self._is_calibrating:
            self._keeper.forget({step.half_block.name for step in run.steps})

    def before_replay(self, run: "Rebuilder", index: int, streams: StreamSnapshot, distance: int) -> None:
        """Put the true streams in place unless what function `index` reads is near enough to what it read."""
        keeper, source = self._keeper, run.steps[index].half_block.source
        # The walk goes down, so that those above are done with. From the lowest, all others can be computed.
        self._references = [each for each in self._references if each.position <= index + 1] or self._references[:1]
        if keeper is None:
            return
        error = self._drift.error_of(index, streams.read(source))
        if error is None or not has_values(error):
            return
        if not keeper.exceeds(float(error), is_calibrating=self._is_calibrating):
            return
        position = index + 1
        name = run.steps[position].half_block.name
        is_alone = streams.origin - position == 1  # Before `streams` is set to others.
        true = self._recompute_streams(run, position)
        # In place: the run walks this snapshot back, and goes on from what is in it.
        streams.position, streams.origin, streams.strides = true.position, true.origin, true.strides
        streams.held, streams.versions = true.held, true.versions
        true_error = float(self._drift.error_of(index, streams.read(source)))  # type: ignore[arg-type]
        if math.isnan(true_error):  # The model's own, which no keyframe removes.
            self._keeper = None
        elif true_error > 0 and keeper.exceeds(true_error, is_calibrating=False):
            raise ReconstructionError(
                f"the stream before `{name}` has a relative error of {true_error:.1g} though it was computed as in the "
                "forward pass: a residual function gives other numbers when it runs again. Set "
                "`torch.use_deterministic_algorithms(True)`; `revnet.numerics.find_nondeterministic` names it."
            )
        else:
            keeper.add_keyframe(name)
            if is_alone:
                keeper.warn_single_step(name, float(error))
            if streams is not run.held:  # The graph is retained: next time, from here.
                # In order: `streams_for` takes the first that is not below the half-block.
                below = [keyframe for keyframe in run.keyframes if keyframe.position <= position]
                run.keyframes = [*below, fork(streams), *run.keyframes[len(below) :]]

    def after_backward(self, run: "Rebuilder") -> None:
        """Let go of the streams on the way."""
        # The first is where a second pass over a retained graph goes forward from.
        del self._references[1:]

    def _recompute_streams(self, run: "Rebuilder", position: int) -> StreamSnapshot:
        """Return the streams at `position` as the forward pass had them: from the nearest true ones, forward again."""
        below = [each for each in (*self._references, *run.keyframes) if each.position <= position]
        # A fork: the run walks it back in place, and the reference stays true.
        streams = fork(max(below, key=lambda each: each.position))
        # Streams on the way that may be asked for next, few enough, and near enough to go on from.
        spacing = max(1, math.isqrt(position - streams.position))
        while streams.position < position:
            step = run.steps[streams.position]
            y, target = step.redo(run, streams), step.half_block.target
            moved = [y if which == target else streams.read(which) for which in range(len(streams.strides))]
            streams = snapshot_of(streams.position + 1, moved)
            if streams.position < position and (position - streams.position) % spacing == 0:
                self._references.append(streams)
        return streams
