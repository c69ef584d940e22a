"""Packages whose names load when they are first used."""

import sys
from types import ModuleType

import pytest

from revnet._lazy import attach
from revnet.errors import MissingDependencyError


@pytest.fixture
def package(monkeypatch):
    """A package with a module `shapes`."""
    shapes = ModuleType("drawing.shapes")
    shapes.Circle = "a circle"
    for name, module in {"drawing": ModuleType("drawing"), "drawing.shapes": shapes}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return "drawing"


def test_names_load_from_their_module(package):
    load, names = attach(package, {"Circle": "shapes"}, submodules=["shapes"])
    assert load("Circle") == "a circle"
    assert load("shapes") is sys.modules["drawing.shapes"]
    assert names() == ["Circle", "shapes"]


def test_modules_are_searched_in_order(package):
    load, _ = attach(package, {"Circle": ("shapes", "missing"), "Square": ("shapes",)})
    assert load("Circle") == "a circle"
    for name in ("Square", "Triangle"):
        with pytest.raises(AttributeError, match=f"module 'drawing' has no attribute '{name}'"):
            load(name)


def test_missing_dependency_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "drawing.plots", None)
    load, _ = attach("revnet", {"save": "_figure_that_is_missing"}, purpose="a figure")
    with pytest.raises(ModuleNotFoundError, match="_figure_that_is_missing"):
        load("save")
    load, _ = attach(package, {"Plot": "plots"}, purpose="a figure")
    with pytest.raises(MissingDependencyError, match="a figure needs drawing"):
        load("Plot")
    load, _ = attach(package, {"Plot": "plots"})
    with pytest.raises(ModuleNotFoundError, match=r"drawing\.plots"):
        load("Plot")
