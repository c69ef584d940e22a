"""`revnet --print-completion` writes scripts that a shell accepts and that complete commands, options and values."""

import shutil
import subprocess
import sys

import pytest

from revnet.errors import install_command


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return the file of the script for bash."""
    pytest.importorskip("shtab", reason="the extra `completion` installs shtab")
    command = [sys.executable, "-m", "revnet", "--print-completion", "bash"]
    file = tmp_path_factory.mktemp("completion") / "revnet.bash"
    file.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return file


def complete(script, line):
    """Return what bash offers at the end of the line."""
    words = " ".join(f"'{word}'" for word in line.split(" "))
    code = f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
    code += '_shtab_revnet revnet "${COMP_WORDS[COMP_CWORD]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, cwd=script.parent)
    assert done.stderr == ""
    return [word.strip() for word in done.stdout.split()]


def test_bash_accepts_the_script(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("revnet ev", ["evaluate"]),
        ("revnet re", ["reproduce", "recipes"]),
        ("revnet train ni", ["nice"]),
        ("revnet train --weights-or-not", []),
        ("revnet train --mod", ["--model"]),
        ("revnet train --model revnet5", ["revnet56"]),
        ("revnet train --config digits/quick/rev", ["digits/quick/revnet38"]),
        ("revnet train --policy s", ["store"]),
        ("revnet train nice --prior l", ["logistic"]),
        ("revnet train lm --attention h", ["hierarchical"]),
        ("revnet memory revnet10", ["revnet104"]),
        ("revnet evaluate rev", ["revnet.bash"]),
        ("revnet plan revnet38 --strategy p", ["pipeline"]),
    ],
)
def test_bash_completes(script, line, words):
    assert complete(script, line) == words


def test_bash_completes_every_option_of_every_command(script):
    for command in ("train", "train nice", "train lm", "doctor", "sample"):
        shown = subprocess.run(
            [sys.executable, "-m", "revnet", *command.split(), "--help"], capture_output=True, text=True
        )
        options = [line.split()[0].rstrip(",") for line in shown.stdout.splitlines() if line.startswith("  --")]
        assert set(complete(script, f"revnet {command} --")) - {"--help"} == set(options)


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(revnet, shell):
    pytest.importorskip("shtab", reason="the extra `completion` installs shtab")
    code, output, errors = revnet("--print-completion", shell)
    assert (code, errors) == (0, "")
    assert "evaluate" in output
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=output, text=True).returncode == 0


def test_missing_shtab_is_one_line(revnet, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    message = f"`--print-completion` needs shtab, which is not installed; run `{install_command('shtab')}`."
    assert revnet("--print-completion", "bash") == (2, "", f"revnet --print-completion: error: {message}\n")
    assert "completion]" in install_command("shtab")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--print-completion"], "`SHELL` is missing; `revnet --print-completion --help` explains it."),
        (["--print-completion=fish"], "`SHELL` (=fish) must be bash, zsh or tcsh."),
        (["--print-completion", "bash", "zsh"], "`zsh` needs an option before it"),
    ],
)
def test_usage_errors_print_one_line(revnet, arguments, message):
    code, output, errors = revnet(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith(f"revnet --print-completion: error: {message}")
    assert errors.count("\n") == 1
