"""Read the sum of several streams, where a half-block has a tuple of indices as its source."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def read_source(streams: Sequence[Tensor], source: Any) -> Tensor:
    """Return the stream of an index, or the sum of the streams of a tuple of indices, always in its order."""
    if type(source) is not tuple:
        return streams[source]
    return add_up([streams[index] for index in source])


def add_up(streams: Sequence[Tensor]) -> Tensor:
    """Return the sum of streams. Two sums of the same streams have the same bits.

    Raises:
        ValueError: The streams have different shapes.
    """
    total = streams[0]
    for stream in streams[1:]:
        if stream.shape != total.shape:
            raise ValueError(
                f"the streams of a sum have the shapes {tuple(total.shape)} and {tuple(stream.shape)}; pass streams of "
                "one shape to a `GroupedBlock`, or use a `MultiStreamBlock`."
            )
        total = total + stream
    return total


class SummingList(list[Tensor]):
    """A list of streams that also takes a tuple of indices, and returns the sum of these streams.

    The plain path indexes an ordinary list, which needs no Python call.
    """

    def __getitem__(self, source: Any) -> Any:
        if type(source) is tuple:
            return add_up([super(SummingList, self).__getitem__(index) for index in source])
        return super().__getitem__(source)
