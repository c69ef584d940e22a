"""Neighborhoods of positions in a chain, and the short chains that show them all."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence

REACH = 2
"""Number of neighbors on each side on which the log of a position may depend."""
_OUTSIDE = None


class WindowNumbers:
    """Numbers for windows of labels: equal windows get the same number."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, labels: Sequence[Hashable]) -> list[int]:
        """Return the number of the window around each position. The window has `REACH` neighbors on each side."""
        padded = [*[_OUTSIDE] * REACH, *labels, *[_OUTSIDE] * REACH]
        width = 2 * REACH + 1
        return [
            self._numbers.setdefault(tuple(padded[index : index + width]), len(self._numbers))
            for index in range(len(labels))
        ]


def positions_to_show(
    windows: Sequence[int], known: Collection[int], fixed: Iterable[int], *, num_examples: int
) -> list[int]:
    """Return the positions of a shorter chain that has each unknown window, in ascending order.

    Args:
        windows: Number of the window around each position of the chain.
        known: Numbers of windows that need no example.
        fixed: Positions that cannot be left out.
        num_examples: Number of examples of each window, if the chain has them.
    """
    shown = set(fixed)
    num_shown = Counter[int]()
    for position, window in enumerate(windows):
        if window not in known and num_shown[window] < num_examples:
            num_shown[window] += 1
            shown.update(range(max(0, position - REACH), min(len(windows), position + REACH + 1)))
    return sorted(shown)
