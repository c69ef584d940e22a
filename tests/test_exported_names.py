import subprocess
import sys
from types import ModuleType

import pytest
import torch

import revnet
from revnet import models

ROOMS = {"bench", "coupling", "data", "functional", "memory", "models", "nn", "numerics", "paper", "training"}


def test_exported_names_are_sorted_and_exist():
    assert revnet.__all__ == sorted(revnet.__all__, key=str.casefold)
    assert set(dir(revnet)) == {*revnet.__all__, *ROOMS, "__version__"}
    for name in dir(revnet):
        assert getattr(revnet, name) is not None


def test_star_import_leaves_the_users_names_alone():
    """The rooms are attributes, but not exported: `revnet.nn` must not replace `torch.nn`."""
    before = {"__version__": "mine"}
    exec("from torch import *\nfrom torch import nn, optim", before)
    after = dict(before)
    exec("from revnet import *", after)
    assert "ReversibleBlock" in after
    assert [name for name, value in before.items() if after[name] is not value] == []
    assert not ROOMS & set(revnet.__all__)
    assert not set(dir(torch.nn)) & set(revnet.__all__)


def test_star_import_of_models_does_not_replace_revnet():
    """A family's file, `revnet.models.revnet`, has the name of the package."""
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


def test_unknown_name_raises_as_modules_do():
    with pytest.raises(AttributeError, match="module 'revnet' has no attribute 'nothing'"):
        _ = revnet.nothing


def test_import_needs_torch_alone():
    """In a fresh interpreter in which only torch and numpy, and what they bring, may be imported."""
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"lightning", "kornia", "datasets", "matplotlib", "sklearn", "rich", "safetensors",
                                  "jsonargparse", "huggingface_hub", "torchmetrics", "pandas"}:
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
import revnet, torch
assert "revnet.training" not in sys.modules
for name in dir(revnet):
    getattr(revnet, name)
revnet.create_model("revnet38")(torch.randn(1, 3, 8, 8)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
