"""Imports go downward: no room imports one above it or on its own level, and no files form an import cycle."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "revnet"
LEVELS = {
    "errors": -2,
    "_paths": -1,
    "_torch_release": -1,
    "_atomic_file": 0,
    "_bytes": 0,
    "_checks": 0,
    "_input_files": 0,
    "_model_output": 0,
    "_outside_text": 0,
    "_types": 0,
    "_torch_internals": 0,
    "_hardware": 0,
    "_image_files": 0,
    "_memory_readings": 0,
    "_palette": 0,
    "_result_files": 0,
    "_units": 0,
    "_documents": 1,
    "_figure": 1,
    "_lazy": 1,
    "_provenance": 1,
    "_text_table": 1,
    "coupling": 1,
    "functional": 1,
    "optim": 1,
    "engine": 2,
    "nn": 3,
    "conversion": 4,
    "distributed": 4,
    "models": 4,
    "numerics": 4,
    "data": 4,
    "memory": 5,
    "training": 6,
    "bench": 6,
    "timm": 6,
    "lightning": 7,
    "paper": 7,
    "transformers": 7,
    "cli": 8,
    "__main__": 9,
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


def imported_files(path: Path, source: Path = SOURCE) -> set[Path]:
    """Return the files that the file imports, lazy imports and imports for type checkers included."""
    names: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append((node.module or "", [alias.name for alias in node.names]))
    files = set()
    for module, members in names:
        if module.partition(".")[0] == "revnet":
            target = source.joinpath(*module.split(".")[1:])
            for candidate in [target / member for member in members] or [target]:
                files |= {next(filter(None, map(file_of, (candidate, target))), path)}
    return files - {path}


def file_of(target: Path) -> Path | None:
    """Return the file of a module or a package."""
    return next((file for file in (target.with_suffix(".py"), target / "__init__.py") if file.is_file()), None)


def cycles(imports: dict[Path, set[Path]]) -> list[list[Path]]:
    """Return the groups of files that import each other, by Tarjan's algorithm for strongly connected components."""
    order: dict[Path, int] = {}
    lowest: dict[Path, int] = {}
    stack: list[Path] = []
    groups: list[list[Path]] = []

    def visit(file: Path) -> None:
        order[file] = lowest[file] = len(order)
        stack.append(file)
        for imported in imports.get(file, ()):
            if imported not in order:
                visit(imported)
                lowest[file] = min(lowest[file], lowest[imported])
            elif imported in stack:
                lowest[file] = min(lowest[file], order[imported])
        if lowest[file] == order[file]:
            index = stack.index(file)
            group, stack[index:] = stack[index:], []
            if len(group) > 1:
                groups.append(sorted(group))

    for file in imports:
        if file not in order:
            visit(file)
    return groups


# Rooms whose cycles remain to be removed. A room without a cycle must leave the set.
ROOMS_WITH_CYCLES = {"engine", "nn"}


def test_no_files_form_an_import_cycle():
    import_cycles = [
        [str(file.relative_to(SOURCE)) for file in group] for group in cycles({f: imported_files(f) for f in FILES})
    ]
    rooms = {room_of(SOURCE / group[0]) for group in import_cycles}
    assert [group for group in import_cycles if room_of(SOURCE / group[0]) not in ROOMS_WITH_CYCLES] == []
    assert rooms >= ROOMS_WITH_CYCLES, (
        f"no cycle is left in {sorted(ROOMS_WITH_CYCLES - rooms)}; remove it from `ROOMS_WITH_CYCLES`"
    )


def test_finds_an_import_cycle(tmp_path):
    first, second, third = (tmp_path / f"{name}.py" for name in ("first", "second", "third"))
    first.write_text("from revnet import second\n")
    second.write_text("from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from revnet.third import name\n")
    third.write_text("def f():\n    import revnet.first\n")
    imports = {file: imported_files(file, tmp_path) for file in (first, second, third)}
    assert cycles(imports) == [[first, second, third]]
    third.write_text("")
    assert cycles({file: imported_files(file, tmp_path) for file in imports}) == []
