"""The scripts in `examples/`: short, listed in the docs, and equal losses for fewer bytes where they run."""

import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MOST_LINES = 30
MOST_COLUMNS = 105
NEEDS = {
    "plain_loop": (),
    "lightning_trainer": ("lightning",),
    "accelerate_loop": ("accelerate",),
    "transformers_trainer": ("transformers", "accelerate"),
    "timm_training": ("timm",),
    "torchrun_ddp": (),
    "torchrun_fsdp2": (),
    "ray_train": ("ray",),
}
"""Modules that each script needs in addition to revnet."""
SLOW = ("torchrun_ddp", "torchrun_fsdp2", "ray_train")
SCRIPTS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NEEDS]


def source_of(name):
    return (ROOT / "examples" / f"{name}.py").read_text()


def test_every_script_is_known():
    # `test_network_examples.py` runs the networks.
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    scripts = {name for name in scripts if not name.startswith(("reversible_", "convert_"))}
    assert scripts == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_script_is_short_and_says_how_it_is_run(name):
    lines = source_of(name).splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= MOST_COLUMNS
    header = re.match(r"(?:#.*\n)+", source_of(name)).group()
    command = "torchrun --nproc-per-node 2" if name.startswith("torchrun") else "python"
    assert f"Run: {command} examples/{name}.py" in header


@pytest.mark.parametrize("name", NEEDS)
def test_script_is_in_the_table_of_the_docs(name):
    table = re.findall(r"^\|.*$", (ROOT / "docs" / "trainers.md").read_text(), re.MULTILINE)
    assert any(f"examples/{name}.py" in row for row in table)


def output_of(name, folder, capsys, monkeypatch):
    """Run a script as its header says, in `folder`, and return what it prints."""
    script = ROOT / "examples" / f"{name}.py"
    if not name.startswith(("torchrun", "ray")):  # Importing PyTorch again would take longer than the script.
        monkeypatch.chdir(folder)
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(torchrun if name.startswith("torchrun") else []), str(script)]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors
    return output


@pytest.mark.filterwarnings("ignore")  # the trainers' own
@pytest.mark.parametrize("name", SCRIPTS)
def test_reversed_and_stored_have_the_same_losses(name, tmp_path, capsys, monkeypatch):
    for module in NEEDS[name]:
        pytest.importorskip(module, reason=f"{module} is not installed")
    if "accelerate" in NEEDS[name]:
        importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    output = output_of(name, tmp_path, capsys, monkeypatch)
    results = dict(re.findall(r"^(reverse|store): (.+)$", output, re.MULTILINE))
    assert set(results) == {"reverse", "store"}, output
    (reversed_bytes, reversed_losses), (stored_bytes, stored_losses) = (
        re.fullmatch(r"([\d,]+) bytes, losses (.+)", results[policy]).groups() for policy in ("reverse", "store")
    )
    assert len(reversed_losses.split()) == 4
    assert reversed_losses == stored_losses  # to the last digit
    assert int(reversed_bytes.replace(",", "")) < int(stored_bytes.replace(",", ""))
