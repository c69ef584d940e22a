import subprocess
import sys

import pytest

import revnet


def test_exported_names_are_sorted_and_exist():
    assert revnet.__all__ == sorted(revnet.__all__, key=lambda name: (name != "__version__", name.casefold()))
    for name in revnet.__all__:
        assert getattr(revnet, name) is not None
    assert dir(revnet) == sorted(revnet.__all__)


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
for name in revnet.__all__:
    getattr(revnet, name)
revnet.create_model("revnet38")(torch.randn(1, 3, 8, 8)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
