"""Count the Python calls inside revnet during one step: a measure of overhead that is exact, unlike time."""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

_SOURCE = Path(__file__).parent.parent
_BENCH = Path(__file__).parent


@dataclass(frozen=True)
class Calls:
    """Python calls inside revnet, by the file that defines the called function."""

    by_file: Counter[Path]

    @property
    def num_calls(self) -> int:
        """Number of calls."""
        return self.by_file.total()

    @property
    def num_files(self) -> int:
        """Number of files that define a called function."""
        return len(self.by_file)

    @property
    def num_lines(self) -> int:
        """Number of lines in these files, which a reader needs to follow the step."""
        return sum(len(path.read_text().splitlines()) for path in self.by_file)


def count_calls(function: Callable[[], object]) -> Calls:
    """Run `function` and count the Python calls inside revnet in this thread.

    The backward pass is included, since on the CPU autograd runs it in the calling thread. Code in `revnet.bench` is
    not counted, since it represents the user's code. Python 3.11 counts a comprehension as a call; later versions do
    not.
    """
    codes: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes[frame.f_code.co_filename] += 1

    before = sys.getprofile()
    with _without_collector():
        sys.setprofile(note)
        try:
            function()
        finally:
            sys.setprofile(before)
    paths = {name: Path(name) for name in codes}
    inside = {name: path for name, path in paths.items() if path.is_relative_to(_SOURCE)}
    return Calls(Counter({path: codes[name] for name, path in inside.items() if not path.is_relative_to(_BENCH)}))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Turn off garbage collection during the count, since finalizers of other objects may call revnet."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
