"""YAML and JSON from outside: limited in size, depth and length of numbers, and read as data."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from revnet._input_files import read_text
from revnet._outside_text import printable
from revnet.errors import CheckpointError

_MOST_YAML_BYTES = 2**18
_MOST_JSON_BYTES = 2**26
_DEEPEST = 20
"""Levels of lists and mappings inside each other."""
_LONGEST_NUMBER = 100
"""Characters of a number; the time that a number takes grows with the square of its length."""


def parse_yaml(text: str) -> Any:
    """Return what a text in YAML says, as plain values.

    Aliases are refused: a text of a few bytes could otherwise stand for gigabytes.

    Raises:
        ValueError: The text is not valid, or exceeds a limit; the message is the reason, in one line.
    """
    return _parsed(text)[1]


def _parsed(text: str) -> tuple[Any, Any]:
    """Return the node of a text in YAML, which knows lines, and its value."""
    import yaml

    if len(text) > _MOST_YAML_BYTES:
        raise ValueError(f"it has more than {_MOST_YAML_BYTES // 2**10} KiB")
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error)) from error
    except (ValueError, OverflowError) as error:  # a date such as 2000-99-99, and a number that is too large
        raise ValueError(_one_line(error)) from error


def read_yaml(path: Path, name: str | None = None) -> dict[Any, Any]:
    """Read a YAML file of settings.

    Args:
        path: The file.
        name: Name of the file in messages; by default its path in backticks.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: The file is not a YAML mapping, exceeds a limit, or has a setting twice; the message names it.
    """
    name = name or f"`{path}`"
    try:
        node, settings = _parsed(read_text(path, _MOST_YAML_BYTES))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid YAML: it is not text in UTF-8, at byte {error.start}.") from error
    except ValueError as error:
        raise ValueError(f"{name} is not valid YAML: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name} must hold one `setting: value` per line.")
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ValueError(
                f"{name} has `{key.value}:` twice, the second time in line {key.start_mark.line + 1}; remove one of "
                "them."
            )
        seen.add(key.value)
    return settings


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that a run has written.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        return parse_json(read_text(path, _MOST_JSON_BYTES))
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise _damaged(path, f"it is not text in UTF-8, at byte {error.start}") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def parse_json(text: str) -> dict[str, Any]:
    """Return the JSON object in a text.

    Raises:
        ValueError: The text is not a JSON object; the message is the reason.
    """
    value = parse_json_value(text)
    if not isinstance(value, dict):
        raise ValueError("it does not hold a JSON object")
    return value


def parse_json_value(text: str) -> Any:
    """Return the JSON value in a text.

    Raises:
        ValueError: The text is not JSON; the message is the reason.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:  # a number of too many digits, too
        raise ValueError(_one_line(error)) from error


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, without aliases and with limits."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"it has the alias *{self.peek_event().anchor}; write the value out")
            self.depth += 1
            if self.depth > _DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_scalar(self, node: Any) -> Any:
            is_number = node.tag.rpartition(":")[2] in ("int", "float")
            if is_number and len(node.value) > _LONGEST_NUMBER:
                raise yaml.YAMLError(f"it has a number of more than {_LONGEST_NUMBER} characters")
            return super().construct_scalar(node)

    return Loader


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"`{path}` is damaged: {reason}; restore the file.")


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:300].rstrip(".")
