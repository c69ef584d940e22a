"""A disturbance of one of two processes ends both with one line, and leaves the checkpoints before it."""

import json
import re

import pytest

from revnet.training import LanguageConfig
from revnet.training.run.checkpoint import read_checkpoint
from tests.copies import launch_copies
from tests.training.processes.resume_programs import Disturb, disturb_all
from tests.training.samples import write_text

DISTURBANCES = {
    "full disk": ("fill", 0, "ddp"),
    "full disk in shards": ("fill", 1, "fsdp2"),
    "deleted folder": ("delete", 0, "ddp"),
    "signal to one process": ("stop", 1, "ddp"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of runs in two processes, with the errors of both."""
    folder = tmp_path_factory.mktemp("disturbances")
    text = write_text(folder, 20)
    configs = {}
    for name, (how, rank, strategy) in DISTURBANCES.items():
        run = folder / name
        config = LanguageConfig(
            data=text,
            length=16,
            batch_size=4,
            dim=16,
            depth=1,
            num_heads=2,
            updates_per_epoch=8,
            epochs=1,
            save_every=1,
            keep_checkpoints=9,
            strategy=strategy,
            out_dir=str(run),
        )
        configs[name] = (config, Disturb(how, rank, run))
    launch_copies(disturb_all, {"configs": configs, "folder": folder})
    return folder


@pytest.mark.parametrize("name", DISTURBANCES)
def test_one_process_reports_one_line(folder, name):
    run = re.escape(str(folder / name))
    failure = f"the checkpoints in `{run}/checkpoints` cannot be written: "
    resume = f"`revnet train --resume {run}` continues"
    expected = {
        "full disk": f"{failure}File too large; make room, and {resume}",
        "full disk in shards": f"{failure}(File too large|the disk may be full); make room, and {resume}",
        "deleted folder": f"`{run}/checkpoints` was deleted while the run was going on",
        "signal to one process": f"stopped; {resume} after update 3",
    }[name]
    errors = [json.loads((folder / f"errors_{rank}.json").read_text())[name] for rank in range(2)]
    (reported,) = [error for error in errors if not error[2]]
    assert re.match(expected, reported[1])
    assert "\n" not in reported[1]


@pytest.mark.parametrize("name", ["full disk", "full disk in shards"])
def test_earlier_checkpoints_remain(folder, name):
    checkpoints = sorted((folder / name / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in checkpoints] == ["update-00000001.ckpt"]
    assert read_checkpoint(checkpoints[0])["global_step"] == 1
