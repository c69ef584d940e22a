"""The names of the package, and its dependencies."""

import ast
import subprocess
import sys
from pathlib import Path

import revnet.training


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_exported_names_are_sorted_and_exist():
    assert revnet.training.__all__ == sorted(revnet.training.__all__, key=str.lower)
    assert all(hasattr(revnet.training, name) for name in revnet.training.__all__)
    assert dir(revnet.training) == sorted(revnet.training.__all__)


def test_settings_need_no_torch():
    code = "import sys; from revnet.training import TrainConfig; TrainConfig(); print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_missing_package_names_the_install_command():
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "import revnet.training\n"
        "try: revnet.training.train\n"
        "except revnet.MissingDependencyError as error: print(error)"
    )
    message = run_python(code)
    assert message.startswith("training needs lightning, which is not installed; run `pip install ")
    assert message.endswith("[train]'`.")


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(revnet.training.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.asname: node.module for node in block.body for alias in node.names}
    assert imported == {name: f"revnet.training.{module}" for name, module in revnet.training._HOME.items()}
