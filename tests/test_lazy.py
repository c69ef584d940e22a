"""Packages whose names load when they are first used."""

import sys
from types import ModuleType

import pytest

from revnet._lazy import attach, read_stub
from revnet.errors import MissingDependencyError

STUB = """# a comment
from drawing import shapes as shapes
from drawing.shapes import Circle as Circle
from drawing.plots import Plot as Plot
from drawing.shapes import area as area

__version__: str
"""


@pytest.fixture
def file(monkeypatch, tmp_path):
    """The `__init__.py` of a package with a module `shapes`, and without its module `plots`."""
    shapes = ModuleType("drawing.shapes")
    shapes.Circle = "a circle"
    for name, module in {"drawing": ModuleType("drawing"), "drawing.shapes": shapes, "drawing.plots": None}.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "__init__.pyi").write_text(STUB)
    return str(tmp_path / "__init__.py")


def test_reads_submodules_and_homes():
    submodules, homes, defined = read_stub("drawing", STUB)
    assert submodules == {"shapes"}
    assert defined == {"__version__"}
    assert homes == {"Circle": "drawing.shapes", "Plot": "drawing.plots", "area": "drawing.shapes"}


def test_names_load_from_their_module(file):
    load, names, exported = attach("drawing", file)
    assert load("Circle") == "a circle"
    assert load("shapes") is sys.modules["drawing.shapes"]
    assert names() == ["Circle", "Plot", "__version__", "area", "shapes"]
    assert exported == ["area", "Circle", "Plot"]


def test_unknown_names_raise(file):
    load, _, _ = attach("drawing", file)
    with pytest.raises(AttributeError, match="module 'drawing' has no attribute 'Square'"):
        load("Square")
    with pytest.raises(AttributeError, match="area"):
        load("area")  # listed, but its module does not define it


def test_missing_dependency_is_named(file):
    load, _, _ = attach("drawing", file, purpose="a figure")
    with pytest.raises(MissingDependencyError, match="a figure needs drawing"):
        load("Plot")
    load, _, _ = attach("drawing", file)
    with pytest.raises(ModuleNotFoundError, match=r"drawing\.plots"):
        load("Plot")
