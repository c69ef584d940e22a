"""Imports go downward: no room imports a room of the same level or above."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "revnet"
LEVELS = {
    "errors": 0,
    "_checks": 0,
    "_types": 0,
    "_torch_internals": 0,
    "_hardware": 0,
    "_memory_readings": 0,
    "_text_table": 0,
    "_figure": 1,
    "_lazy": 1,
    "_provenance": 1,
    "coupling": 1,
    "functional": 1,
    "engine": 2,
    "nn": 3,
    "models": 4,
    "memory": 4,
    "numerics": 4,
    "data": 4,
    "training": 5,
    "bench": 5,
    "paper": 6,
    "cli": 7,
}
# The package imports its public names for type checkers. At run time they load when they are first used.
GATHERS = {"__init__"}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms of revnet that the file imports, in lazy imports too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import; write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += names if node.module == "revnet" else [node.module or ""]
    return {module.split(".")[1] for module in modules if module.startswith("revnet.")}


FILES = sorted(path for path in SOURCE.rglob("*.py") if room_of(path) not in GATHERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downward(path):
    room = room_of(path)
    assert room in LEVELS, f"`{room}` is a new room: give it a level"
    for imported in imported_rooms(path) - {room, "__version__"}:
        assert LEVELS[imported] < LEVELS[room], f"{path.name} in `{room}` imports `{imported}`, which is not below it"


def test_upward_import_is_found(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "def f():\n    from revnet.cli import main\n    import revnet.training.run\n    from revnet import nn\n"
    )
    assert imported_rooms(file) == {"cli", "training", "nn"}
