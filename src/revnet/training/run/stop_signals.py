"""Ctrl-C and SIGTERM: the first one stops a run after the next checkpoint, a second one stops it at once."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_STOP_SECONDS = 1.0
"""Time within which two signals count as one: a terminal and a launcher may both pass on the same Ctrl-C."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run at once, without a checkpoint.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class SavedAndStopped(Exception):  # noqa: N818 - not an error
    """Ctrl-C or SIGTERM stopped a run after a checkpoint.

    Args:
        signal_number: The signal, of any of the processes.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class StopSignals:
    """Context manager that handles Ctrl-C and SIGTERM during a run.

    A signal raises `Stopped`, except while training `waits`: then the first one is kept in `number`, for the training
    loop to act on.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """Signal that has come, if any."""
        self.waits = False
        """Whether the training loop looks at `number`, so that a first signal can wait."""
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:
                signal.signal(number, handler)
        self._previous = {}

    def install(self) -> None:
        """Handle the signals, also after Lightning has installed its own handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and time.monotonic() - self._time < _SAME_STOP_SECONDS:
            return
        if self.number is not None or not self.waits:
            raise Stopped(number)
        self.number, self._time = number, time.monotonic()
