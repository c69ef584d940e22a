"""Walk streams back if the graph is retained, or if streams are held at keyframes."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from revnet._torch_internals import call_after_backward
from revnet.engine._streams import StreamSnapshot

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


def streams_for(run: "Rebuilder", index: int) -> StreamSnapshot:
    """Return the streams to walk back to half-block `index`; they are at it or above it."""
    held = next((keyframe for keyframe in run.keyframes if keyframe.position >= index), run.held)
    assert held is not None
    if run.last_alive <= index:  # Nothing above can be asked for again, so the held streams may move.
        run.walk = None
        run.held = held
        run.keyframes = [keyframe for keyframe in run.keyframes if keyframe.position < index]
        return held
    # The graph is retained: a walk on a fork leaves the held streams unchanged (rule 6).
    if run.walk is None or run.walk.position < index or held.position < run.walk.position:
        run.walk = fork(held)
        _drop_walk_after_backward(run)
    return run.walk


def _drop_walk_after_backward(run: "Rebuilder") -> None:
    # Weak: the graph owns the run (rule 1), and the queue of the autograd engine does not.
    reference = weakref.ref(run)

    def drop() -> None:
        alive = reference()
        if alive is not None:
            with alive.lock:  # Another thread may be walking.
                alive.walk = None
                for observer in alive.observers:
                    observer.after_backward(alive)

    call_after_backward(drop)


def fork(streams: StreamSnapshot) -> StreamSnapshot:
    """Return a fork of the streams, which is walked back on its own.

    Both share their memory, so neither writes to it.
    """
    # `detach` shares the version, so that the fork detects writes to the tensors that it was forked from.
    held = [None if tensor is None else streams.read(number).detach() for number, tensor in enumerate(streams.held)]
    copy = StreamSnapshot(streams.position, held, streams.strides)
    copy.origin = streams.origin
    return copy


def snapshot_of(position: int, streams: Sequence[Tensor]) -> StreamSnapshot:
    """Return a snapshot of `streams` in their current layout."""
    return StreamSnapshot(position, [stream.detach() for stream in streams], [stream.stride() for stream in streams])
