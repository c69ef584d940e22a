"""Shared memory for the batches of worker processes: checked before they start, watched while they run."""

import math
import os
import shutil
import sys
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

SECONDS_PER_BATCH = 900
"""Time after which a batch that has not come ends the run. Files may lie on a slow network."""
PREFETCH_FACTOR = 2
"""Batches that each worker prepares in advance: PyTorch's default."""
_FOLDER = Path("/dev/shm")
_FAILED = 70


def check_shared_memory(num_workers: int, batch_size: int, image_shape: tuple[int, ...]) -> None:
    """Raise unless the batches that all workers prepare fit into shared memory; otherwise they would hang.

    Args:
        num_workers: Number of workers.
        batch_size: Images in a batch of this process.
        image_shape: Shape of an image, of one byte per number.

    Raises:
        ValueError: They do not fit.
    """
    free_bytes = _free_bytes() if num_workers > 0 else None
    if free_bytes is None:
        return
    # One more batch is in the hands of the caller.
    needed_bytes = (PREFETCH_FACTOR * num_workers + 1) * batch_size * math.prod(image_shape)
    if needed_bytes > free_bytes:
        raise ValueError(
            f"`num_workers` (={num_workers}) need {needed_bytes / 2**20:,.1f} MiB of shared memory for batches of "
            f"{batch_size} images, and {_FOLDER} has {free_bytes / 2**20:,.1f} MiB left; pass "
            "`--num-workers 0`, or give the container more, with `--shm-size` for instance."
        )


def end_if_batches_are_lost() -> None:
    """Let a worker end, once it cannot hand out a batch, instead of leaving its reader to wait."""
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]  # CPython's hook for this


def _end(error: Exception, _batch: Any) -> None:
    reason = " ".join(str(error).split())
    print(f"a process that loads data cannot hand out a batch: {reason}", file=sys.stderr, flush=True)
    os._exit(_FAILED)


def _free_bytes() -> int | None:
    """Return the free shared memory; None where the system keeps it elsewhere."""
    return shutil.disk_usage(_FOLDER).free if _FOLDER.is_dir() else None
