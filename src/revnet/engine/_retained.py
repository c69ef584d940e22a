"""Walking back where a graph is retained, or where streams are held on the way."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from revnet._torch_internals import call_after_backward
from revnet.engine._streams import StreamSnapshot

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


def streams_for(run: "Rebuilder", index: int) -> StreamSnapshot:
    """Return the streams to walk back to half-block `index`, at it or above it."""
    held = next((keyframe for keyframe in run.keyframes if keyframe.position >= index), run.held)
    assert held is not None
    if run.last_alive <= index:  # Nothing above can be asked for again: what is held itself may move.
        run.walk = None
        run.held = held
        run.keyframes = [keyframe for keyframe in run.keyframes if keyframe.position < index]
        return held
    # The graph is retained: a walk on a fork leaves what is held as it is (rule 6).
    if run.walk is None or run.walk.position < index or held.position < run.walk.position:
        run.walk = fork(held)
        _drop_walk_after_backward(run)
    return run.walk


def _drop_walk_after_backward(run: "Rebuilder") -> None:
    # Weak: the graph owns the run (rule 1), and not the queue of the autograd engine.
    reference = weakref.ref(run)

    def drop() -> None:
        alive = reference()
        if alive is not None:
            with alive.lock:  # Another thread may walk at this moment.
                alive.walk = None
                for observer in alive.observers:
                    observer.after_backward(alive)

    call_after_backward(drop)


def fork(streams: StreamSnapshot) -> StreamSnapshot:
    """Return the same streams, to be walked back on their own. Both see one memory, so neither writes to it."""
    # `detach` shares the version, so that the fork notices a write to what it was forked from.
    held = [None if tensor is None else streams.read(which).detach() for which, tensor in enumerate(streams.held)]
    copy = StreamSnapshot(streams.position, held, streams.strides)
    copy.origin = streams.origin
    return copy


def snapshot_of(position: int, streams: Sequence[Tensor]) -> StreamSnapshot:
    """Return a snapshot of `streams`, as they lie."""
    return StreamSnapshot(position, [each.detach() for each in streams], [each.stride() for each in streams])
