"""The settings of a training run: one dataclass, checked when it is made, saved beside what it made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from revnet.training._files import atomic_path

Preprocessing = Literal["standardize", "mean_image"]
Precision = Literal["32-true", "bf16-mixed"]
Device = Literal["auto", "cpu", "cuda", "mps"]

# What a data set is given where the settings leave it open.
_USUAL: dict[str, dict[str, Any]] = {
    # A mirrored 2 is not a 2, an 8x8 image has no 4 pixels to spare, and threads that share so little work mostly wait
    # for each other as soon as the cores are busy.
    "digits": {"crop_padding": 1, "horizontal_flip": False, "num_threads": 1},
}
_USUAL_ELSEWHERE: dict[str, Any] = {"crop_padding": 4, "horizontal_flip": True}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run.

    The defaults train a small RevNet on the embedded digits. `configs/` holds complete recipes, the paper's among them.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting lies outside its range.

    References:
        Gomez et al. (2017), The Reversible Residual Network, section 4 and appendix: the CIFAR recipe.
    """

    data: str = "digits"
    """Data set: a name (`digits`, `cifar10`), or a folder of parquet files laid out as on the Hugging Face hub."""

    model: str = "revnet38"
    """Model; `revnet models` lists them."""

    epochs: int = 60
    """How often the training images are seen."""

    batch_size: int = 100
    """Images per update. What an epoch leaves over is seen in another epoch."""

    lr: float = 0.1
    """Learning rate of the first updates."""

    decay_at: tuple[float, ...] = (0.5, 0.75)
    """When the learning rate is multiplied by `decay_factor`, as fractions of all updates."""

    decay_factor: float = 0.1
    """What the learning rate is multiplied by."""

    momentum: float = 0.9
    """Momentum of the gradient descent, without Nesterov's correction."""

    weight_decay: float = 2e-4
    """Decay of the convolution and linear weights; batch norms and biases are left alone."""

    val_fraction: float = 0.1
    """Share of the training images, taken evenly from all classes, that validates instead of training. With 0, the
    paper's protocol, every image trains and the best weights are the last."""

    preprocess: Preprocessing = "standardize"
    """`standardize` each channel by the training pixels, or subtract the `mean_image` of training and test set and stay
    on the 0-255 scale, as the paper does."""

    crop_padding: int | None = None
    """Pixels added on each side before a random crop; null is the data set's usual: 1 for digits, 4 elsewhere."""

    horizontal_flip: bool | None = None
    """Whether images are mirrored at random; null is the data set's usual: no for digits, yes elsewhere."""

    precision: Precision = "32-true"
    """Arithmetic: `32-true`, or `bf16-mixed` for autocast to bfloat16."""

    device: Device = "auto"
    """Where to train; `auto` takes the GPU if there is one."""

    num_threads: int | None = None
    """Threads on the CPU; null is the data set's usual: 1 for digits, PyTorch's choice elsewhere."""

    seed: int = 0
    """Seed of the initial weights, the held-out images, their order and the augmentation."""

    out_dir: str | None = None
    """Folder of the run, which must not hold one yet; null takes the next free `runs/<data>_<model>_<number>`."""

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            _check_name(name, getattr(self, name))
        _check_integer("epochs", self.epochs, at_least=1)
        _check_integer("batch_size", self.batch_size, at_least=1)
        _check_integer("seed", self.seed, at_least=0, at_most=2**32 - 1)
        _check_number("lr", self.lr, "above 0", lambda x: x > 0, "0.1 is usual")
        _check_number("decay_factor", self.decay_factor, "above 0 and at most 1", lambda x: 0 < x <= 1, "0.1 is usual")
        _check_number("momentum", self.momentum, "from 0 to below 1", lambda x: 0 <= x < 1, "0.9 is usual")
        _check_number("weight_decay", self.weight_decay, "0 or more", lambda x: x >= 0, "2e-4 is usual")
        _check_number("val_fraction", self.val_fraction, "from 0 to below 1", lambda x: 0 <= x < 1, "0.1 is usual")
        _check_choice("preprocess", self.preprocess, get_args(Preprocessing))
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("device", self.device, get_args(Device))
        if self.crop_padding is not None:
            _check_integer("crop_padding", self.crop_padding, at_least=0)
        if self.num_threads is not None:
            _check_integer("num_threads", self.num_threads, at_least=1)
        if self.horizontal_flip not in (True, False, None):
            raise TypeError(f"`horizontal_flip` (={self.horizontal_flip!r}) must be true, false or null.")
        # YAML has lists only; the frozen dataclass wants a tuple, which compares and hashes.
        object.__setattr__(self, "decay_at", _check_fractions("decay_at", self.decay_at))
        if self.out_dir is not None:
            _check_name("out_dir", self.out_dir)

    def resolve(self, data_name: str) -> Self:
        """Fill what was left to the data set called `data_name`."""
        usual = _USUAL.get(data_name, _USUAL_ELSEWHERE)
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `revnet train --config` takes."""
        import yaml

        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no YAML mapping, or names a setting that does not exist.
        """
        import yaml

        try:
            settings = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"`{path}` is not valid YAML: {_one_line(error)}.") from error
        if not isinstance(settings, dict):
            raise ValueError(f"`{path}` must hold one `setting: value` per line.")
        unknown = sorted(set(map(str, settings)) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"`{path}` has the unknown setting `{unknown[0]}`; `revnet train --help` lists them all.")
        return cls(**settings)


def _check_name(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` (={value!r}) must be a string.")
    if not value.strip():
        raise ValueError(f"`{name}` (={value!r}) must not be empty.")


def _check_integer(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` (={value!r}) must be an integer.")
    if value < at_least:
        raise ValueError(f"`{name}` (={value}) must be {at_least} or more.")
    if at_most is not None and value > at_most:
        raise ValueError(f"`{name}` (={value}) must be {at_most} or less.")


def _check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool], advice: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"`{name}` (={value!r}) must be a number.")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"`{name}` (={value}) must be a finite number {rule}; {advice}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = " or ".join(f"`{choice}`" for choice in choices)
        raise ValueError(f"`{name}` (={value!r}) must be {listed}.")


def _check_fractions(name: str, values: Any) -> tuple[float, ...]:
    fractions = tuple(values) if isinstance(values, list | tuple) else None
    if fractions is None or not all(isinstance(x, int | float) and 0 < x < 1 for x in fractions):
        raise ValueError(f"`{name}` (={values!r}) must be a list of fractions between 0 and 1, such as [0.5, 0.75].")
    if list(fractions) != sorted(fractions):
        raise ValueError(f"`{name}` (={list(fractions)}) must rise; sort it.")
    return fractions


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
