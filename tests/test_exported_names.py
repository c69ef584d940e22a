import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import revnet
from revnet import models

ROOMS = {
    "bench",
    "conversion",
    "coupling",
    "data",
    "distributed",
    "functional",
    "memory",
    "models",
    "nn",
    "numerics",
    "optim",
    "paper",
    "training",
}
LAZY = ("revnet", "revnet.paper", "revnet.training")
"""Packages whose names load when they are first used."""
NUM_NAMES = 186
"""Number of different names that all rooms export. Lower it when a name goes. A new name needs a reason."""


def exported_names(package):
    """Return the names that a package exports: `__all__`, or all that it imports from its own modules."""
    module = import_module(package)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [name for name, value in vars(module).items() if name[0] != "_" and not isinstance(value, ModuleType)]


def imports_of_stub(package):
    """Return the modules and the names in the stub file of a package."""
    tree = ast.parse(Path(import_module(package).__file__).with_suffix(".pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.asname) for node in imports for alias in node.names]


@pytest.mark.parametrize("package", LAZY)
def test_stub_lists_each_name_once_and_where_it_is_defined(package):
    imports = imports_of_stub(package)
    assert len({name for _, name in imports}) == len(imports) > 5
    for module, name in imports:
        assert getattr(import_module(package), name) is getattr(import_module(module), name)


def test_stub_lists_the_rooms():
    assert {name for module, name in imports_of_stub("revnet") if module == "revnet"} == ROOMS


def test_number_of_exported_names():
    packages = ["revnet", "revnet.engine", *(f"revnet.{room}" for room in ROOMS)]
    names = {name for package in packages for name in exported_names(package)}
    assert len(names) == NUM_NAMES


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_say_that_they_are_provisional(room):
    assert "provisional" in import_module(f"revnet.{room}").__doc__


def test_the_package_says_which_names_are_stable():
    assert "`revnet.__all__` are the stable API" in revnet.__doc__


def test_exported_names_are_sorted_and_exist():
    assert revnet.__all__ == sorted(revnet.__all__, key=str.casefold)
    assert set(dir(revnet)) == {*revnet.__all__, *ROOMS, "__version__"}
    for name in dir(revnet):
        assert getattr(revnet, name) is not None


def test_star_import_does_not_replace_names_of_torch():
    """The rooms are attributes, but a star import leaves them out: `revnet.nn` must not replace `torch.nn`."""
    before = {"__version__": "mine"}
    exec("from torch import *\nfrom torch import nn, optim", before)
    after = dict(before)
    exec("from revnet import *", after)
    assert "ReversibleBlock" in after
    assert [name for name, value in before.items() if after[name] is not value] == []
    assert not ROOMS & set(revnet.__all__)
    assert not set(dir(torch.nn)) & set(revnet.__all__)


def test_star_import_of_models_does_not_replace_revnet():
    """The module `revnet.models.revnet` has the name of the package."""
    namespace = {"revnet": revnet}
    exec("from revnet.models import *", namespace)
    assert namespace["revnet"] is revnet
    public = {name for name, value in vars(models).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert set(models.__all__) == public
    assert models.__all__ == sorted(models.__all__, key=str.casefold)


def test_every_error_is_exported():
    from revnet import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert names <= set(revnet.__all__)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'revnet' has no attribute 'nothing'"):
        _ = revnet.nothing


def test_import_needs_only_torch():
    """Run in a fresh interpreter that refuses to import optional dependencies."""
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"lightning", "kornia", "datasets", "matplotlib", "sklearn", "rich", "safetensors",
                                  "huggingface_hub", "torchmetrics", "pandas"}:
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
import revnet, torch
assert "revnet.training" not in sys.modules
for name in dir(revnet):
    getattr(revnet, name)
revnet.create_model("revnet38")(torch.randn(1, 3, 8, 8)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
