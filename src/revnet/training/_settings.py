"""Settings as YAML: dataclasses written and read, and the task that a file says it is for."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from revnet.training._files import atomic_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Settings = TypeVar("_Settings", bound="DataclassInstance")


class RunSettings(Protocol):
    """What every run is set by, whatever is trained."""

    @property
    def data(self) -> str | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def num_threads(self) -> int | None: ...
    @property
    def policy(self) -> str: ...
    @property
    def memory_budget(self) -> str | None: ...
    @property
    def out_dir(self) -> str | None: ...

    def save(self, path: Path) -> None:
        """Write the settings as YAML."""


def save_settings(config: DataclassInstance, path: Path) -> None:
    """Write a dataclass as YAML that `--config` takes."""
    import yaml

    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False))


def load_settings(kind: type[_Settings], path: Path, command: str) -> _Settings:
    """Read a dataclass that `save_settings` wrote.

    Args:
        kind: The dataclass.
        path: The file.
        command: Whose `--help` lists the settings.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no YAML mapping, or names a setting that does not exist.
    """
    settings = _read(path)
    unknown = sorted(set(map(str, settings)) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"`{path}` has the unknown setting `{unknown[0]}`; `{command} --help` lists them all.")
    return kind(**settings)


def task_of(path: Path) -> str | None:
    """The `task` that a file of settings names; those of a classification name none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no YAML mapping.
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
