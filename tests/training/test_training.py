"""The names of the package, and its dependencies."""

import subprocess
import sys

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
