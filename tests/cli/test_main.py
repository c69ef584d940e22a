import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import revnet as package
from revnet._image_files import list_images
from revnet.cli.main import COMMANDS, main
from revnet.errors import DataError
from tests.cli.random_lines import FUNCTIONS


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_all_commands(revnet, arguments):
    code, output, errors = revnet(*arguments)
    assert (code, errors) == (0, "")
    text = " ".join(output.split())
    assert all(f" {name} {summary} " in text for name, summary in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_a_documented_function_with_help(revnet, name):
    command = getattr(import_module(f"revnet.cli.{name}"), name)
    code, output, errors = revnet(name, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith(f"usage: revnet {name} ")
    assert inspect.getdoc(command).splitlines()[0] in output
    assert "Args:" not in output


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_torch_is_not_loaded_for_help_or_wrong_flags():
    lines = [["--help"], ["--version"], ["train", "--epochs", "0"], ["plan", "revnet38"], ["recipes"], ["models"]]
    lines += [[*command.split("_", 1), "--help"] for command in FUNCTIONS]
    done = run_python(
        "import sys\n"
        "from revnet.cli.main import main\n"
        f"for line in {lines}:\n"
        "    main(line)\n"
        "    heavy = {'lightning', 'matplotlib', 'numpy', 'torch'} & sys.modules.keys()\n"
        "    assert not heavy, (line, heavy)\n"
    )
    assert done.returncode == 0, done.stderr


def test_python_m_revnet_is_the_command_line():
    command = [sys.executable, "-m", "revnet", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"{package.__version__}\n"


@pytest.mark.slow
def test_matplotlib_does_not_warn_without_a_writable_home(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name[:3] not in ("MPL", "XDG")}
    environment |= {"HOME": "/proc/nothing", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "revnet", "memory", "revnet38", "--batch", "1", "--out-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.glob("matplotlib-*")) or list(tmp_path.glob("memory_*.png"))


def test_commands_with_trained_weights_start_quickly(tmp_path):
    """Each of these packages takes as long to import as the rest of the command."""
    code = (
        "import sys, torch\n"
        "heavy = {'lightning', 'torch._dynamo', 'torch.distributed.checkpoint', 'torch.distributed.tensor', 'sympy'}\n"
        "heavy -= set(sys.modules)\n"
        "from revnet.cli.main import main\n"
        "assert main(['predict', 'revnet38.digits', 'sample']) == 0\n"
        "assert main(['sample', 'nice.digits', '--num', '2']) == 0\n"
        "assert main(['evaluate', 'revnet38.digits']) == 0\n"
        "assert main(['generate', 'lm.shakespeare', '--prompt', 'To', '--num', '2']) == 0\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]")


def test_version(revnet):
    assert revnet("--version") == (0, f"{package.__version__}\n", "")


def test_rejects_an_unknown_command_with_a_suggestion(revnet):
    assert revnet("tran") == (2, "", "revnet: error: unknown command `tran`; did you mean `train`?\n")
    assert revnet("xyz") == (2, "", f"revnet: error: unknown command `xyz`; the commands are {', '.join(COMMANDS)}.\n")


def test_a_warning_is_one_line():
    code = (
        "import warnings, revnet.cli.models, revnet.cli._parser\n"
        "from revnet.cli.main import main\n"
        "revnet.cli.models.models = lambda **_: warnings.warn('`n` is large.')\n"
        "revnet.cli._parser.parse = lambda *_: {}\n"
        "before = warnings.formatwarning\n"
        "main(['models'])\n"
        "assert warnings.formatwarning is before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "revnet models: warning: `n` is large.\n"


def test_installed_script_runs():
    script = Path(sys.executable).with_name("revnet")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.strip() == package.__version__


def fail_with(error):
    def models():
        raise error

    return models


@pytest.fixture
def replaced(monkeypatch):
    """Return a function that replaces `revnet models`."""
    from revnet.cli import models

    return lambda function: monkeypatch.setattr(models, "models", function)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("the data\nare gone"), "the data are gone"),
        (FileNotFoundError(2, "No such file or directory", "x.parquet"), "No such file or directory: `x.parquet`"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            ModuleNotFoundError("No module", name="lightning.pytorch"),
            "lightning is not installed; run `pip install -e '.[train]'`.",
        ),
        (ModuleNotFoundError("No module", name="yaml"), "yaml is not installed; run `pip install -e '.[cli]'`."),
    ],
)
def test_expected_errors_print_one_line(revnet, replaced, monkeypatch, error, message):
    monkeypatch.chdir(Path(package.__file__).parents[2])
    replaced(fail_with(error))
    assert revnet("models") == (2, "", f"revnet models: error: {message}\n")


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ValueError, TypeError, AssertionError])
def test_a_bug_keeps_its_traceback(replaced, error):
    replaced(fail_with(error("a bug")))  # unexpected, since revnet did not raise it
    with pytest.raises(error, match="a bug"):
        main(["models"])


def test_debug_mode_shows_tracebacks(replaced, monkeypatch):
    monkeypatch.setenv("REVNET_DEBUG", "1")
    replaced(fail_with(DataError("gone")))
    with pytest.raises(DataError, match="gone"):
        main(["models"])


def test_ctrl_c_prints_one_line(revnet, replaced):
    replaced(fail_with(KeyboardInterrupt()))
    assert revnet("models") == (130, "", "\nrevnet models: stopped.\n")


def test_closed_pipe_ends_quietly():
    code = "import sys; from revnet.cli.main import main; sys.exit(main(['recipes']))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        process = subprocess.run([sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (141, "")


@pytest.mark.parametrize(
    "line",
    [["predict", "run", ""], ["score", "", "a.png"], ["evaluate", "run", "--data", ""], ["train", "--out-dir", ""]],
)
def test_rejects_an_empty_path(revnet, line):
    code, output, errors = revnet(*line)
    assert (code, output) == (2, "")
    assert errors.endswith(" (='') must not be empty; pass a path, such as . for the current folder.\n")
    assert errors.count("\n") == 1


def test_rejects_an_empty_path_in_python():
    with pytest.raises(ValueError, match="`paths` holds an empty path; leave it out, or pass"):
        list_images(["cat.png", ""])
