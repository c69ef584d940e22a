from pathlib import Path

import pytest

from revnet import errors
from revnet.errors import MissingDependencyError, install_command


def test_install_command_of_a_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "revnet" / "errors.py"))
    assert install_command("lightning") == "pip install 'revnet[train]'"
    assert install_command("yaml") == "pip install 'revnet[cli]'"


def test_install_command_of_a_clone(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "src" / "revnet" / "errors.py"))
    assert install_command("matplotlib") == f"pip install -e '{tmp_path}[plot]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("matplotlib") == "pip install -e '.[plot]'"


@pytest.mark.parametrize("package", ["Pillow", "PIL", "rich", "safetensors"])
def test_missing_package_names_the_smallest_extra(package):
    assert "[cli]'`." in str(MissingDependencyError.of(package, "this"))


def test_errors_state_the_extras_of_the_project():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {"cli", "plot", "train"} <= project["optional-dependencies"].keys()
