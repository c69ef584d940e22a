"""The printed report of an evaluation: figures, hardest classes, most frequent mistakes."""

from collections.abc import Sequence

from revnet._outside_text import shorten
from revnet._text_table import format_lines
from revnet._units import counted, format_loss, format_rate
from revnet.training.evaluation.evaluate_result import EvaluateResult
from revnet.training.run.used_weights import describe_weights

_NUM_SHOWN = 5  # number of classes, and of mistakes
_LONGEST_NAME = 40


def report_evaluation(result: EvaluateResult) -> str:
    """Return a report that fits a screen; the files of `result.save` hold the rest."""
    classes = result.confusion.per_class()
    choice = "" if result.split_seed is None else f", a fifth of each class, chosen by seed {result.split_seed}"
    images = counted(result.num_images, "test image")
    heading = [
        (
            "model",
            result.model if result.checkpoint is None else f"{result.model}, {describe_weights(result.checkpoint)}",
        ),
        ("data", f"{result.data}, {images} of {counted(len(classes), 'class', 'classes')}{choice}"),
        ("accuracy", result.report()),
        ("cross-entropy", f"{format_loss(result.cross_entropy)} nats/image"),
        ("speed", f"{format_rate(result.images_per_second, 'images')} on {result.device}, loading included"),
    ]
    if result.top5_error is not None:
        count = f"{result.num_top5_errors:,} of {result.num_images:,} not among the five best"
        heading.insert(3, ("top-5 error", f"{100 * result.top5_error:.2f} % ({count})"))
    hardest = sorted((row for row in classes if row.num_errors > 0), key=lambda row: (-row.error, -row.num_images))
    errors = [
        (_shorten(row.name), f"{100 * row.error:6.2f} % wrong, {row.num_errors:,} of {row.num_images:,}")
        for row in hardest[:_NUM_SHOWN]
    ]
    mistakes = [
        (f"{_shorten(mistake.truth)} -> {_shorten(mistake.answer)}", f"{mistake.num_images:,}")
        for mistake in result.confusion.mistakes(_NUM_SHOWN)
    ]
    return format_lines([*heading, *_under("hardest", errors), *_under("confusions", mistakes)])


def _under(title: str, rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Put the title before the first row, if there are rows."""
    lines = format_lines(rows).splitlines() if rows else []
    return [(title if number == 0 else "", line) for number, line in enumerate(lines)]


def _shorten(name: str) -> str:
    return shorten(" ".join(name.split()), _LONGEST_NAME)  # a folder's name may hold line breaks
