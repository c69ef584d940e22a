"""What the README and the docs show works, and what they name exists."""

import ast
import importlib
import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from revnet.cli.main import COMMANDS, SUBCOMMANDS, main
from revnet.errors import MissingDependencyError

pytestmark = pytest.mark.usefixtures("own_temporary_folder")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")])
MAX_COLUMNS = 88
BUILDING = "build-reversible.md"
LONG_PAGES = ("evaluate.md", "language-model-head.md", "out-of-memory.md", "volumes.md", "when-to-use.md")
"""Pages that train or plan for many seconds."""
MESSAGES_OF_PYTORCH = ("`torch.OutOfMemoryError: CUDA out of memory`", "unexpected keyword argument")


def with_subcommands():
    """Return the commands, each followed by its subcommands."""
    return [
        " ".join((command, *subcommand))
        for command in COMMANDS
        for subcommand in ((), *((name,) for name in SUBCOMMANDS.get(command, ())))
    ]


def name_of(page):
    return str(page.relative_to(ROOT))


def code_of(page):
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_paths_exist():
    paths = [path for path in re.findall(r"\]\(([^)]+)\)", README) if "://" not in path]
    paths += re.findall(r"configs/\S+\.yaml", README)
    assert len(paths) >= 4
    for path in paths:
        assert (ROOT / path.split("#")[0]).exists(), path


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([\w-]+)`", README)
    assert {"train", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_command_reference_shows_and_explains_each_command():
    page = (DOCS / "command-line.md").read_text()
    assert set(re.findall(r"^revnet (\w+)", page, re.MULTILINE)) == set(COMMANDS)
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings == with_subcommands()


@pytest.mark.parametrize("command", with_subcommands())
def test_command_reference_lists_the_options(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    options = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    if command == "figure":  # it has the options of `train`, too
        assert main(["train", "--help"]) == 0
        options -= set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    _, section = (DOCS / "command-line.md").read_text().split(f"\n## {command}\n")
    listed = set(re.findall(r"`(--[\w-]+)`", section.split("\n## ")[0]))
    assert listed == options


def test_models_are_listed_as_they_are(capsys):
    assert main(["models"]) == 0
    assert f"```text\n{capsys.readouterr().out}```" in (DOCS / "models.md").read_text()


def test_versions_agree_with_the_package():
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"`constraints.txt` pins ([\d.]+\d)", README)[1] == re.search(r"torch==([\d.]+)", constraints)[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or newer" in README


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own, in torch.compile
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in (BUILDING, *LONG_PAGES)], ids=name_of)
def test_the_code_of_a_page_runs(page):
    exec(compile(code_of(page), page.name, "exec"), {"__name__": "page"})


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG_PAGES)
def test_the_code_of_a_long_page_runs(page):
    test_the_code_of_a_page_runs(DOCS / page)


def test_the_code_of_the_building_page_prints_its_bytes(capsys):
    code = code_of(DOCS / BUILDING)
    exec(compile(code, BUILDING, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(activations\(.*\)\)  # (.*)", code)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_code_blocks_fit_the_width_of_a_page(page):
    blocks = re.findall(r"```\w+\n(.*?)```", page.read_text(), re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > MAX_COLUMNS] == []


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+\.md)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_result_files_exist():
    results = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    for page in PAGES:
        for name in re.findall(r"`(?:benchmarks/results/)?([\w-]+_cpu2_[\d-]+\.md)`", page.read_text()):
            assert name in results, f"{page.name}: {name}"


def strings_of(path):
    """Yield the string literals of a file, joined where they are adjacent; `{}` stands for a value."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield "".join(str(part) for part in parts)


def test_messages_of_the_troubleshooting_page_are_in_the_source():
    text = "\n".join(string for path in (ROOT / "src").rglob("*.py") for string in strings_of(path))
    entries = re.findall(r"^\*\*.*", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message for entry in entries for message in re.findall(r"\*\*(.+?)\*\*", entry)]
    assert len(messages) > 20
    unknown = [message for message in messages if message not in text and message not in MESSAGES_OF_PYTORCH]
    assert unknown == []


PEERS = {
    "memcnn": "memcnn",
    "RevTorch": "revtorch",
    "revlib": "revlib",
    "reformer-pytorch": "reformer_pytorch",
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of memcnn: old names in PyTorch
@pytest.mark.parametrize("library", PEERS)
def test_both_calls_of_another_library_compute_the_same(library, monkeypatch):
    if find_spec(PEERS[library]) is None:
        pytest.skip(f"{library} is not installed; benchmarks/peers.txt lists it")
    if library == "reformer-pytorch":
        package = ModuleType("reformer_pytorch")  # empty: its other modules need packages that are not installed
        package.__path__ = list(find_spec("reformer_pytorch").submodule_search_locations)
        monkeypatch.setitem(sys.modules, "reformer_pytorch", package)
    introduction, *sections = (DOCS / "coming-from.md").read_text().split("\n## ")
    (section,) = [section for section in sections if section.startswith(f"{library}\n")]
    names = {"__name__": "page"}
    for code in re.findall(r"```py(?:thon)?\n(.*?)```", introduction + section, re.DOTALL):
        exec(compile(code, "coming-from.md", "exec"), names)
    assert torch.equal(names["old"](names["x"].clone()), names["new"](names["x"]))


def test_flags_of_shown_commands_exist(capsys):
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
    shown: dict[str, set[str]] = {}
    for page in pages:
        for command, rest in re.findall(
            r"^(?:\$ )?revnet (train (?:nice|lm)\b|\w+)([^#\n]*)", page.read_text(), re.MULTILINE
        ):
            shown.setdefault(command, set()).update(re.findall(r"(?<=\s)--[\w-]+", rest))
    assert {"train", "train nice", "train lm", "plan", "memory", "evaluate"} <= shown.keys()
    for command, flags in shown.items():
        assert main([*command.split(), "--help"]) == 0
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert flags <= known, command


@pytest.mark.parametrize("name", ["architecture", "extending"])
def test_files_that_a_page_names_exist(name):
    page = (DOCS / f"{name}.md").read_text()
    paths = [path for path in re.findall(r"`([\w/.]+\.(?:py|md|toml))`", page) if "/" in path and "NAME" not in path]
    assert len(paths) > 5
    assert [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "src" / "revnet"))] == []


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.stem)
def test_api_page_lists_every_exported_name(page):
    text = page.read_text()
    room = f"revnet.{page.stem}"
    if page.stem == "index" or f"automodule:: {room}\n" in text:
        return  # `automodule` lists what there is
    try:
        module = importlib.import_module(room)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    listed = set(re.findall(rf"auto(?:class|function|data):: {re.escape(room)}\.(\w+)$", text, re.MULTILINE))
    exported = getattr(module, "__all__", None) or {
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", "").startswith("revnet")
    }
    assert set(exported) <= listed
