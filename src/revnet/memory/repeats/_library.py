"""Pieces of logs that have been seen."""

from collections.abc import Hashable, Sequence

from revnet.memory.repeats._frame import NotRepeatedError
from revnet.memory.repeats._pieces import Piece
from revnet.memory.repeats._windows import WindowNumbers


class Library:
    """The pieces that runs of short chains have shown, by the window around their position."""

    def __init__(self) -> None:
        self._numbers = WindowNumbers()
        self._pieces: dict[int, Piece] = {}
        self._shared: dict[Hashable, Hashable] = {}

    @property
    def known(self) -> dict[int, Piece]:
        """Pieces by the number of their window."""
        return self._pieces

    def windows(self, labels: Sequence[Hashable]) -> list[int]:
        """Return the number of the window around each position."""
        return self._numbers.of(labels)

    def add(self, window: int, piece: Piece) -> None:
        """Add a piece.

        Raises:
            NotRepeatedError: The window has another piece.
        """
        known = self._pieces.get(window)
        self._pieces[window] = piece if known is None else known.merged(piece)

    def share(self, name: Hashable, value: Hashable) -> None:
        """Note a value that all chains have in common.

        Raises:
            NotRepeatedError: Another chain has another value.
        """
        if self._shared.setdefault(name, value) != value:
            raise NotRepeatedError
