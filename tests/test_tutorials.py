"""Each tutorial is a notebook with the output of a complete run, and a run from scratch prints the same."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_COLUMNS = 88
MAX_BYTES = 150_000

per_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_pages_list_every_tutorial():
    assert len(NOTEBOOKS) >= 5
    index, start = (FOLDER / "index.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.name})" in index
        assert f"\ntutorials/{path.stem}\n" in start


@per_notebook
def test_notebook_was_run_from_top_to_bottom(path):
    cells = cells_of(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = list(chain.from_iterable(cell["outputs"] for cell in cells))
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs), "a warning was stored"
    assert any("image/png" in output.get("data", {}) for output in outputs)


@per_notebook
def test_notebook_is_small_and_narrow(path):
    assert path.stat().st_size < MAX_BYTES
    lines = [line.rstrip("\n") for cell in cells_of(path, "code") for line in cell["source"]]
    for cell in cells_of(path, "code"):
        lines += [line.rstrip("\n") for output in cell["outputs"] for line in output.get("text", [])]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "index.md"], ids=lambda path: path.name)
def test_links_exist(path):
    is_page = path.suffix == ".md"
    text = path.read_text() if is_page else "".join(chain(*(cell["source"] for cell in cells_of(path, "markdown"))))
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (FOLDER / target).exists()] == []


@pytest.mark.slow
@per_notebook
def test_a_run_from_scratch_prints_the_same(path):
    if find_spec("nbclient") is None or find_spec("ipykernel") is None:
        pytest.skip("nbclient or ipykernel is not installed; the extra `docs` has them")
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "tutorials", path.stem],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert run.returncode == 0, run.stdout + run.stderr
