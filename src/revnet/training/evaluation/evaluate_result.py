"""The result of an evaluation: its figures, and the files that hold them."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revnet._atomic_file import write_text
from revnet._documents import read_json
from revnet._figure import check_matplotlib, try_to_draw
from revnet._paths import expand_user
from revnet._result_files import IsOwn, begins_with, check_replaced, is_picture, make_results_folder, writing_to
from revnet.errors import CheckpointError, MissingDependencyError
from revnet.models.pretrained.hub_files import WEIGHTS
from revnet.models.pretrained.shipped import results_folder
from revnet.training.evaluation.confusion import Confusion
from revnet.training.evaluation.confusion_plot import plot_confusion
from revnet.training.run import run_dir


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Result of a classifier on a test set.

    Two results are equal if model, data and figures are equal; speed, device, file and machine are not compared.
    """

    model: str
    """Name of the model."""

    data: str
    """Name of the data set."""

    confusion: Confusion
    """Counts of images by true class and answered class."""

    num_top5_errors: int | None
    """Number of images whose class is not among the five best answers; None with five classes or fewer."""

    cross_entropy: float
    """Mean cross-entropy over the images, in nats."""

    seconds: float = field(compare=False)
    """Time of the evaluation, loading included."""

    device: str = field(compare=False)
    """Device of the classifier."""

    checkpoint: Path | None = field(default=None, compare=False)
    """File of the weights; None if they were in memory."""

    split_seed: int | None = field(default=None, compare=False)
    """Seed that chose the test images of a folder of classes without `train`; None if they are all of a test set."""

    machine: list[str] = field(default_factory=list, compare=False)
    """Lines that describe the hardware, the versions, the date and the command."""

    @property
    def num_images(self) -> int:
        """Number of images in the test set."""
        return self.confusion.num_images

    @property
    def num_errors(self) -> int:
        """Number of images that were assigned to a wrong class."""
        return self.confusion.num_errors

    @property
    def error(self) -> float:
        """Share of wrong answers."""
        return self.num_errors / self.num_images

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return (self.num_images - self.num_errors) / self.num_images

    @property
    def top5_error(self) -> float | None:
        """Share of images whose class is not among the five best answers."""
        return None if self.num_top5_errors is None else self.num_top5_errors / self.num_images

    @property
    def images_per_second(self) -> float:
        """Throughput, loading included."""
        return self.num_images / self.seconds

    def report(self) -> str:
        """Return accuracy and error as one line of text."""
        return (
            f"{100 * self.accuracy:.2f} % (error {100 * self.error:.2f} %, "
            f"{self.num_errors:,} of {self.num_images:,} wrong)"
        )

    def save(self, out_dir: str | Path | None = None) -> list[Path]:
        """Write the figures (JSON), the errors of all classes (CSV) and the plot of the confusions (PNG).

        The files are named `evaluation_<data>`, or `evaluation_<data>_<weights>` for weights other than the last of a
        run, such as `evaluation_digits_best`. Files of an earlier evaluation are replaced, and no others.

        Args:
            out_dir: Folder for the files; by default the folder of the weights, or the current folder for weights from
                the hub or of the package.

        Returns:
            Paths of the files. The plot is missing if it cannot be drawn, or if matplotlib is not installed.

        Raises:
            ValueError: `out_dir` cannot be written, holds another file with one of the names, or is missing for
                weights that were in memory.
        """
        if out_dir is None and self.checkpoint is None:
            raise ValueError("`out_dir` (=None) must be given, since the weights were not read from a file.")
        folder = expand_user(out_dir) if out_dir is not None else results_folder(Path(self.checkpoint or ""))
        names = _files(self.data, self.checkpoint)
        make_results_folder("out_dir", folder, names)
        figures, table, picture = files = [folder / name for name in names]
        with writing_to("out_dir", folder):
            write_text(figures, json.dumps(self._figures(), indent=2) + "\n")
            self.confusion.save_csv(table)
            title = f"{self.model} on {self.data}: error {100 * self.error:.2f} %"
            files.remove(picture)
            if self._draw(picture, title):
                files.append(picture)
        return files

    def _draw(self, picture: Path, title: str) -> bool:
        """Draw the confusions, and return whether that was possible."""
        try:
            check_matplotlib()
        except MissingDependencyError:
            return False
        return try_to_draw(lambda: plot_confusion(self.confusion, picture, title), picture)

    def _figures(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "data": self.data,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "split_seed": self.split_seed,
            "num_images": self.num_images,
            "num_errors": self.num_errors,
            "accuracy": self.accuracy,
            "error": self.error,
            "num_top5_errors": self.num_top5_errors,
            "top5_error": self.top5_error,
            # JSON has no infinity and no NaN.
            "cross_entropy": self.cross_entropy if math.isfinite(self.cross_entropy) else None,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "machine": self.machine,
        }


def check_evaluation_files(out_dir: str | Path, data: str, checkpoint: Path) -> None:
    """Raise if `EvaluateResult.save` would replace a file in `out_dir` that is not of an earlier evaluation.

    Args:
        out_dir: The folder.
        data: Name of the data set.
        checkpoint: File of the weights.

    Raises:
        ValueError: There is such a file.
    """
    check_replaced("out_dir", expand_user(out_dir), _files(data, checkpoint))


def _files(data: str, checkpoint: Path | None) -> dict[str, IsOwn]:
    """Return the names of the files: figures, table and picture; and how each is recognized."""
    stem = f"evaluation_{run_dir.data_stem(data)}"
    last = [Path(name).stem for name in (run_dir.LAST_WEIGHTS, WEIGHTS)]
    if checkpoint is not None and checkpoint.stem not in last:
        stem += f"_{checkpoint.stem}"
    table = begins_with(b"class,images,errors,error,")
    return {f"{stem}.json": _holds_figures, f"{stem}.csv": table, f"{stem}.png": is_picture}


def _holds_figures(path: Path) -> bool:
    try:
        return {"num_errors", "cross_entropy", "machine"} <= read_json(path).keys()
    except CheckpointError:
        return False
