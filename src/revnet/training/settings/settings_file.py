"""A file of settings: YAML in which each setting stands once."""

from pathlib import Path
from typing import Any

from revnet._documents import read_yaml
from revnet._input_files import open_regular


def read_settings(path: Path, name: str | None = None) -> dict[Any, Any]:
    """Read a YAML file of settings.

    Args:
        path: The file.
        name: Name of the file in messages; by default its path in backticks.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: The file is not a YAML mapping, exceeds a limit, or has a setting twice.
    """
    import yaml

    settings = read_yaml(path, name)  # which also keeps the file within its limits
    with open_regular(path) as file:
        node = yaml.compose(file.read(), yaml.SafeLoader)
    seen = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in seen:
            raise ValueError(
                f"{name or f'`{path}`'} has `{key.value}:` twice, the second time in line "
                f"{key.start_mark.line + 1}; remove one of them."
            )
        seen.add(key.value)
    return settings
