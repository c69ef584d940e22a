"""What the README and the docs show works, and what they name exists."""

import re
import tomllib
from pathlib import Path

import pytest

from revnet import list_models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_paths_exist():
    paths = [path for path in re.findall(r"\]\(([^)]+)\)", README) if "://" not in path]
    paths += re.findall(r"configs/\S+\.yaml", README)
    assert len(paths) >= 4
    for path in paths:
        assert (ROOT / path).exists(), path


def test_commands_are_in_the_makefile_and_the_table():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from revnet.cli.main import COMMANDS

    shown = set(re.findall(r"^revnet (\w+)", README, re.MULTILINE))
    assert shown == set(COMMANDS)


def test_models_are_listed_as_they_are():
    for name in list_models():
        assert re.search(rf"^{name} ", README, re.MULTILINE), name


def test_versions_are_those_of_the_package():
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"tested release, ([\d.]+)", README)[1] == re.search(r"torch==([\d.]+)", constraints)[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or newer" in README


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own, in torch.compile
@pytest.mark.parametrize(
    "page",
    sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")]),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_of_a_page_runs(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(code, page.name, "exec"), {"__name__": "page"})


def test_flags_of_shown_commands_exist(capsys):
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
    shown: dict[str, set[str]] = {}
    for page in pages:
        for command, rest in re.findall(
            r"^(?:\$ )?revnet (train (?:nice|lm)\b|\w+)([^#\n]*)", page.read_text(), re.MULTILINE
        ):
            shown.setdefault(command, set()).update(re.findall(r"(?<=\s)--[\w-]+", rest))
    assert {"train", "train nice", "train lm", "plan", "memory", "evaluate"} <= shown.keys()
    from revnet.cli.main import main

    for command, flags in shown.items():
        assert main([*command.split(), "--help"]) == 0
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert flags <= known, command
