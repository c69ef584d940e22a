import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import revnet as package
from revnet.cli.main import COMMANDS, main
from revnet.errors import DataError


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_all_commands(revnet, arguments):
    code, output, errors = revnet(*arguments)
    assert (code, errors) == (0, "")
    assert all(f"  {name} " in output and summary in output for name, summary in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_documented_function_with_help(revnet, name):
    command = getattr(import_module(f"revnet.cli.{name}"), name)
    code, output, errors = revnet(name, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith(f"usage: revnet {name} ")
    assert inspect.getdoc(command).splitlines()[0] in output
    assert "Args:" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "--epochs", "0"],
        ["evaluate", "--help"],
        ["plan", "--help"],
        ["plan", "revnet38"],
    ],
)
def test_torch_is_not_loaded_for_help_or_wrong_flags(arguments):
    code = f"import sys; from revnet.cli.main import main; main({arguments}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_version(revnet):
    assert revnet("--version") == (0, f"{package.__version__}\n", "")


def test_an_unknown_command_is_refused_with_the_nearest_one(revnet):
    assert revnet("tran") == (2, "", "revnet: error: `tran` is no command; did you mean `train`?\n")
    assert revnet("xyz") == (2, "", f"revnet: error: `xyz` is no command; the commands are {', '.join(COMMANDS)}.\n")


def test_the_installed_script_answers():
    script = Path(sys.executable).with_name("revnet")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.strip() == package.__version__


def fail_with(error):
    def models():
        raise error

    return models


@pytest.fixture
def replaced(monkeypatch):
    """A function that puts another function in the place of `revnet models`."""
    from revnet.cli import models

    return lambda function: monkeypatch.setattr(models, "models", function)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("the data\nare gone"), "the data are gone"),
        (FileNotFoundError(2, "No such file or directory", "x.parquet"), "No such file or directory: `x.parquet`"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            ModuleNotFoundError("No module", name="kornia"),
            "kornia is not installed; run `pip install 'revnet[train]'`.",
        ),
    ],
)
def test_a_mistake_of_the_user_is_told_in_one_line(revnet, replaced, error, message):
    replaced(fail_with(error))
    assert revnet("models") == (2, "", f"revnet models: error: {message}\n")


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ValueError, TypeError, AssertionError])
def test_a_bug_keeps_its_traceback(replaced, error):
    replaced(fail_with(error("a bug")))  # a `ValueError`, too, unless revnet itself has raised it
    with pytest.raises(error, match="a bug"):
        main(["models"])


def test_the_traceback_of_any_error_can_be_seen(replaced, monkeypatch):
    monkeypatch.setenv("REVNET_DEBUG", "1")
    replaced(fail_with(DataError("gone")))
    with pytest.raises(DataError, match="gone"):
        main(["models"])


def test_ctrl_c_is_told_in_one_line(revnet, replaced):
    replaced(fail_with(KeyboardInterrupt()))
    assert revnet("models") == (130, "", "\nrevnet models: stopped.\n")


def test_nobody_reading_on_is_no_error():
    code = "import sys; from revnet.cli.main import main; sys.exit(main(['models']))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        process = subprocess.run([sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (141, "")
