"""Classes and functions of the source have a bounded length."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
LONGEST_CLASS = 200
"""Largest number of lines of a class."""
LONGEST_BODY = 60
"""Largest number of lines of a function, without its signature and docstring."""

# Classes and functions to be split. One that is short enough fails the test, so that it is removed here.
EXCEPTIONS: set[str] = set()


def lengths(source: str) -> Iterator[tuple[str, int, int]]:
    """Yield each class and function with its number of lines and its limit."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield f"class {node.name}", node.end_lineno - node.lineno + 1, LONGEST_CLASS
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                yield f"def {node.name}", node.end_lineno - body[0].lineno + 1, LONGEST_BODY


def too_long(source: str) -> dict[str, str]:
    return {name: f"{length} lines, of {most}" for name, length, most in lengths(source) if length > most}


def test_no_class_or_function_is_too_long():
    long_definitions = {
        f"{path.relative_to(SOURCE).as_posix()}: {name}": by
        for path in sorted(SOURCE.rglob("*.py"))
        for name, by in too_long(path.read_text()).items()
    }
    assert {name: by for name, by in long_definitions.items() if name not in EXCEPTIONS} == {}
    assert long_definitions.keys() >= EXCEPTIONS, (
        f"no longer too long: {sorted(EXCEPTIONS - long_definitions.keys())}; take it out"
    )


@pytest.mark.parametrize(("num_lines", "is_too_long"), [(60, False), (61, True)])
def test_docstring_of_a_function_does_not_count(num_lines, is_too_long):
    source = 'async def f(\n    x,\n):\n    """Do.\n\n    Much.\n    """\n' + "    x += 1\n" * num_lines
    assert bool(too_long(source)) == is_too_long


@pytest.mark.parametrize(("num_lines", "is_too_long"), [(200, False), (201, True)])
def test_every_line_of_a_class_counts(num_lines, is_too_long):
    source = 'class A:\n    """One."""\n' + "    x = 1\n" * (num_lines - 2)
    assert bool(too_long(source)) == is_too_long


COMMON_NAMES = {"__init__.py"}
"""Names that may occur more often."""
FAMILIES = ("revnet/training/",)
"""Rooms in which several families have files of the same names."""


def test_no_file_name_occurs_three_times():
    files = [path.relative_to(SOURCE).as_posix() for path in sorted(SOURCE.rglob("*.py"))]
    by_name: dict[str, list[str]] = {}
    for file in files:
        if not file.startswith(FAMILIES):
            by_name.setdefault(file.rpartition("/")[2], []).append(file)
    assert [same for name, same in by_name.items() if name not in COMMON_NAMES and len(same) > 2] == []
