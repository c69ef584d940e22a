"""The first table of `memory.py`: predicted peaks and the peaks of real steps."""

import time
from collections.abc import Sequence

from _memory_page import Row, Section, mib, table
from _memory_step import OPTIMIZER, images_of, loss, make, on_meta

from revnet.memory import measure, predict
from revnet.models import published_image_size

BATCH_SIZES = {32: (4, 16, 64), 224: (1, 2, 4)}
"""Batch sizes by image size."""


def prediction_section(names: Sequence[str], batch_sizes: Sequence[int] | None) -> Section:
    """Compare prediction and count of each model at each batch size."""
    rows = [
        predicted_and_counted(name, batch_size)
        for name in names
        for batch_size in batch_sizes or BATCH_SIZES[published_image_size(name)]
    ]
    num_exact = sum(row["counted_peak_bytes"] == row["predicted_peak_bytes"] for row in rows)
    largest = max(abs(row["error_percent"]) for row in rows)
    columns = ("model", "batch", "counted, MiB", "predicted, MiB", "error, %", "counting, s", "predicting, s")
    lines = [
        "## Predicted and counted",
        "",
        f"Equal to the byte: {num_exact} of {len(rows)}. Largest error: {largest:.3f} %. The prediction uses the",
        "meta device; the count is of a real step. Models have their default policies.",
        "",
        *table(columns, [_cells(row) for row in rows]),
    ]
    return Section(lines, rows)


def predicted_and_counted(name: str, batch_size: int) -> Row:
    """Return prediction and count of one model at one batch size."""
    start = time.perf_counter()
    predicted = predict(*on_meta(name, batch_size), optimizer=OPTIMIZER, loss=loss)
    middle = time.perf_counter()
    counted = measure(make(name), images_of(name, batch_size), optimizer=OPTIMIZER, loss=loss)
    return {
        "model": name,
        "batch_size": batch_size,
        "counted_peak_bytes": counted.peak_bytes,
        "predicted_peak_bytes": predicted.peak_bytes,
        "error_percent": 100 * (predicted.peak_bytes / counted.peak_bytes - 1),
        "counting_seconds": round(time.perf_counter() - middle, 2),
        "predicting_seconds": round(middle - start, 2),
    }


def _cells(row: Row) -> list[str]:
    return [
        row["model"],
        str(row["batch_size"]),
        mib(row["counted_peak_bytes"]),
        mib(row["predicted_peak_bytes"]),
        f"{row['error_percent']:+.3f}" if row["error_percent"] else "0",
        f"{row['counting_seconds']:.1f}",
        f"{row['predicting_seconds']:.1f}",
    ]
