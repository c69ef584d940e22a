"""The flags that `revnet plan` and `revnet memory` share: which training step they speak of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from revnet.errors import MissingDependencyError
from revnet.training.checks import check_integer
from revnet.training.choices import Precision

InputDtype = Literal["float32", "int64"]
OptimizerName = Literal["sgd", "adam", "adamw", "none"]

_MOST = 1_000_000
"""With more, the operations of a step cannot be counted in 64 bits."""


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """A training step as the flags have it, checked before PyTorch is loaded.

    Raises:
        ValueError: A flag is out of range, or does not go with another.
    """

    model: str
    batch: int
    image: int | None
    input_shape: tuple[int, ...] | None
    input_dtype: InputDtype
    optimizer: OptimizerName
    precision: Precision
    device: str

    def __post_init__(self) -> None:
        check_integer("--batch", self.batch, at_least=1, at_most=_MOST)
        if self.image is not None:
            check_integer("--image", self.image, at_least=1, at_most=_MOST)
        if self.input_shape is not None and self.image is not None:
            raise ValueError("`--image` and `--input-shape` both say what an input is; leave one of them out.")
        if self.input_shape is not None and not all(size > 0 for size in self.input_shape):
            raise ValueError(f"`--input-shape` (={list(self.input_shape)}) must be positive sizes, such as [512].")
        if not self.is_own and (self.input_shape is not None or self.input_dtype != "float32"):
            flag = "--input-dtype" if self.input_shape is None else "--input-shape"
            raise ValueError(f"`{flag}` is for models of your own; revnet's take images, whose side is `--image`.")

    @property
    def is_own(self) -> bool:
        """Whether the model is the user's, `package.module:attribute`."""
        return ":" in self.model

    @property
    def title(self) -> str:
        """What a picture is of."""
        return f"{self.model}, batch {self.batch}"

    def picture(self, folder: Path, kind: str, *words: str) -> Path:
        """The file of a picture."""
        model = re.sub(r"[^A-Za-z0-9.]+", "-", self.model).strip("-.")
        return folder / f"{'_'.join([kind, model, f'batch{self.batch}', *words])}.png"


def open_folder(output_dir: str | None) -> Path:
    """Make the folder for pictures, if need be: a mistake is told now, not after the work."""
    folder = Path(output_dir or ".").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def without_matplotlib() -> Iterator[None]:
    """Where matplotlib is not installed, say so in place of drawing: the text is worth having."""
    try:
        yield
    except MissingDependencyError as error:
        print(f"no picture: {error}")
