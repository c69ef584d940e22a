"""Options that `revnet memory`, `plan` and `doctor` share: which training step they examine."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from revnet._outside_text import file_stem
from revnet._paths import expand_user
from revnet._result_files import is_picture, make_results_folder, writing_to
from revnet.cli._errors import UsageError
from revnet.errors import MissingDependencyError
from revnet.training.settings.checks import check_integer

InputDtype = Literal["float32", "int64"]
InputShapes = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""One shape, or a shape for each input."""
InputDtypes = InputDtype | tuple[InputDtype, ...]
"""One type for all inputs, or a type for each."""
StepPrecision = Literal["32-true", "bf16-mixed"]
OptimizerName = Literal["sgd", "adam", "adamw", "none"]
StepLoss = Literal["sum", "cross-entropy", "chunked"]

_MOST = 1_000_000
"""Largest batch and image size: above, the operations of a step overflow 64 bits."""

_MOST_NUMBERS = 10**12
"""Largest number of elements of all inputs: above, a large model has more FLOPs than 64 bits count."""


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """A training step as the options describe it, checked before PyTorch is loaded.

    Raises:
        ValueError: An option is out of range, or conflicts with another.
    """

    model: str
    batch: int
    image: int | None
    input_shape: InputShapes | None
    input_dtype: InputDtypes
    optimizer: OptimizerName
    precision: StepPrecision
    device: str
    step_in_backward: bool = False
    loss: StepLoss = "sum"

    def __post_init__(self) -> None:
        check_integer("--batch", self.batch, at_least=1, at_most=_MOST)
        if self.image is not None:
            check_integer("--image", self.image, at_least=1, at_most=_MOST)
        if self.input_shape is not None and self.image is not None:
            raise UsageError("`--image` and `--input-shape` both set the shape of an input; leave one of the two out.")
        if not all(size > 0 for shape in self.input_shapes or () for size in shape):
            raise UsageError(f"`--input-shape` (={_spell(self.input_shape)}) must hold positive sizes, such as [512].")
        shapes = (self.input_shapes or ()) if self.image is None else ((3, self.image, self.image),)
        if self.batch * sum(map(math.prod, shapes)) > _MOST_NUMBERS:
            sizes = " and ".join("x".join(map(str, shape)) for shape in shapes)
            raise UsageError(
                f"`--batch` (={self.batch}) inputs of {sizes} are more than a step can count; pass smaller sizes."
            )
        if not self.is_own and (self.input_shape is not None or self.input_dtype != "float32"):
            flag = "--input-dtype" if self.input_shape is None else "--input-shape"
            raise UsageError(
                f"`{flag}` is for models of your own; revnet's models take images, whose size is `--image`."
            )
        if isinstance(self.input_dtype, tuple) and len(self.input_dtype) != len(self.input_shapes or [()]):
            raise UsageError(
                f"`--input-dtype` (={_spell(self.input_dtype)}) must be one type for all inputs, or one for each shape "
                f"of `--input-shape` (={_spell(self.input_shape)})."
            )
        if self.loss != "sum" and self.input_dtypes[0] != "int64":
            raise UsageError(
                f"`--loss` (={self.loss}) is for models of your own that read tokens, such as "
                "revnet.models:reformer_enwik8; pass --input-shape [1024] --input-dtype int64, or leave it out."
            )
        if self.step_in_backward and self.optimizer == "none":
            raise UsageError("`--step-in-backward` needs an optimizer, but `--optimizer` (=none) counts none.")

    @property
    def is_own(self) -> bool:
        """Whether the model is the user's own, given as `package.module:attribute`."""
        return ":" in self.model

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...] | None:
        """Shapes of the inputs without the batch, or None for images."""
        shape = self.input_shape
        if shape is None:
            return None
        if shape and isinstance(shape[0], tuple):
            return shape  # a list of shapes
        return (shape,)  # type: ignore[return-value] # one shape

    @property
    def input_dtypes(self) -> tuple[InputDtype, ...]:
        """Types of the inputs."""
        if isinstance(self.input_dtype, tuple):
            return self.input_dtype
        return (self.input_dtype,) * len(self.input_shapes or [()])

    @property
    def title(self) -> str:
        """Title of a picture."""
        return f"{self.model}, batch {self.batch}"

    def picture(self, kind: str, *words: str) -> str:
        """Return the name of the file of a picture."""
        return f"{'_'.join([kind, file_stem(self.model), f'batch{self.batch}', *words])}.png"


def _spell(values: object) -> str:
    """Return the value of an option as it is written on the command line."""
    return str(values).replace("(", "[").replace(",)", "]").replace(")", "]").replace("'", "")


def open_folder(out_dir: str | None, *pictures: str) -> Path:
    """Create the folder for pictures, before the work, so that a bad path fails at once.

    Args:
        out_dir: The folder, by default the current one.
        pictures: Names of the pictures, which may replace earlier pictures only.

    Raises:
        ValueError: The folder cannot be created, or a picture would replace another file.
    """
    folder = expand_user(out_dir or ".")
    make_results_folder("--out-dir", folder, dict.fromkeys(pictures, is_picture))
    return folder


@contextmanager
def optional_picture(folder: Path) -> Iterator[None]:
    """Skip the picture in `folder` with a note if matplotlib is not installed."""
    try:
        with writing_to("--out-dir", folder):
            yield
    except MissingDependencyError as error:
        print(f"no picture: {error}")
