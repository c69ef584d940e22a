"""A torchvision that was built for another PyTorch ends in one line."""

import sys

import pytest

from revnet.cli.main import main
from revnet.errors import MissingDependencyError

LINE = "torchvision was built for another PyTorch"


@pytest.fixture
def _foreign(monkeypatch):
    """Let an import fail as Lightning's does next to a torchvision with other operators."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "revnet.training.entry":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in ("revnet.training.entry", "revnet.cli.train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.mark.usefixtures("_foreign")
def test_one_line_on_the_command_line(capsys):
    assert main(["train", "--epochs", "1"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"revnet train: error: {LINE}")
    assert errors.count("\n") == 1


@pytest.mark.usefixtures("_foreign")
def test_one_line_in_python():
    import revnet.training

    with pytest.raises(MissingDependencyError, match=LINE):
        revnet.training.__getattr__("train")
