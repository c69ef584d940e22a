"""The settings of a run: a dataclass whose fields carry their rules, written and read as YAML."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, field, fields, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, get_args, get_origin

from revnet.training.atomic_file import atomic_path
from revnet.training.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_memory_budget,
    check_name,
    check_number,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Check = Callable[[str, Any], object]
"""Function that raises unless the setting of that name may have that value."""


class AbstractRunConfig(ABC):
    """Settings of any training run: the base of three dataclasses.

    A field is checked by its type and by the rule that `integer` or `number` gives it; None passes where the type has
    it.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range, or does not go with another.
    """

    command: ClassVar[str]
    """Command that takes these settings; its `--help` lists them."""

    # The fields that all three have. Each states them in its own order, with its own default.
    data: str | None
    policy: str
    memory_budget: str | None
    epochs: int
    max_updates: int | None
    batch_size: int
    precision: str
    device: str
    num_threads: int | None
    out_dir: str | None

    def __post_init__(self) -> None:
        for setting in fields(self._as_dataclass()):
            check_setting(setting.name, setting.type, getattr(self, setting.name), setting.metadata.get("check"))
        if self.memory_budget is not None:
            check_memory_budget(self.memory_budget, self.policy)
        self._check_together()

    @abstractmethod
    def _check_together(self) -> None:
        """Raise unless the settings go together."""

    def limit_updates(self, updates_per_epoch: int) -> tuple[Self, int]:
        """Return the settings with as many epochs as `max_updates` leaves, and the number of updates of the run."""
        num_updates = min(self.epochs * updates_per_epoch, self.max_updates or sys.maxsize)
        epochs = -(-num_updates // updates_per_epoch)
        return cast("Self", replace(self._as_dataclass(), epochs=epochs)), num_updates

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `--config` reads."""
        import yaml

        values = asdict(self._as_dataclass())
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings that `save` wrote.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a YAML mapping, or has an unknown setting.
        """
        settings = _read(path)
        known = {setting.name for setting in fields(cast("type[DataclassInstance]", cls))}
        unknown = sorted(set(map(str, settings)) - known)
        if unknown:
            raise ValueError(f"`{path}` has the unknown setting `{unknown[0]}`; `{cls.command} --help` lists them all.")
        return cls(**settings)

    def _as_dataclass(self) -> "DataclassInstance":
        return cast("DataclassInstance", self)


def integer(default: int | None, *, at_least: int, at_most: int | None = None) -> Any:
    """Return a dataclass field for an integer in a range."""
    return checked(default, partial(check_integer, at_least=at_least, at_most=at_most))


def number(default: float | None, rule: str, holds: Callable[[float], bool], *, usual: str) -> Any:
    """Return a dataclass field for a finite number.

    Args:
        default: Value of a setting that is left out.
        rule: The rule in words, such as "above 0".
        holds: The rule as a function.
        usual: A usual value, for the error message.
    """
    return checked(default, partial(check_number, rule=rule, holds=holds, advice=f"{usual} is usual"))


def checked(default: Any, check: Check) -> Any:
    """Return a dataclass field that `check` is called for."""
    return field(default=default, metadata={"check": check})


def check_setting(name: str, kind: Any, value: Any, check: Check | None) -> None:
    """Raise unless `value` suits the field: its type `kind`, and its `check` if it has one."""
    is_optional = NoneType in get_args(kind)
    if is_optional and value is None:
        return
    if is_optional:
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if get_origin(kind) is Literal:
        check_choice(name, value, get_args(kind))
    elif kind is bool:
        check_flag(name, value, is_optional=is_optional)
    elif kind is str:
        check_name(name, value)
    if check is not None:
        check(name, value)


def read_task(path: Path) -> str | None:
    """Return the `task` that a file of settings names; settings of a classification name none.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a YAML mapping.
    """
    return _read(path).get("task")


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is not valid YAML: {_one_line(error)}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` must hold one `setting: value` per line.")
    return settings


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
