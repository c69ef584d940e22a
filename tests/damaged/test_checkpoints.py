"""Damaged and forged checkpoints."""

import io
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from revnet.errors import CheckpointError
from revnet.training import load_density, resume
from revnet.training.run.checkpoint import read_checkpoint, read_outline
from revnet.training.run.shard_list import check_shards, read_shard_metadata
from revnet.training.run.state_digest import DIGEST_KEY, is_changed
from tests.damaged.damage import assert_ends_well, damage_bytes, damage_tree, other_file, seeded
from tests.training.samples import newest_checkpoint

CASES = [pytest.param(range(15), id="few"), pytest.param(range(400), marks=pytest.mark.slow, id="many")]
RESUMED = [pytest.param(range(2), id="few"), pytest.param(range(300), marks=pytest.mark.slow, id="many")]


@pytest.fixture
def folder(density_run, tmp_path) -> Path:
    """Return a copy of the run as it was before its last update."""
    folder = shutil.copytree(density_run, tmp_path / "run")
    (folder / "summary.json").unlink()
    newest_checkpoint(folder).unlink()
    return folder


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_checkpoints(density_run, tmp_path, numbers):
    original = newest_checkpoint(density_run)
    content, expected = original.read_bytes(), load_density(original).state_dict()
    path = tmp_path / "damaged.ckpt"
    for number in numbers:
        draw = seeded("checkpoints", number)
        path.write_bytes(damage_bytes(content, draw) if number % 20 else other_file(draw))
        loaded = assert_ends_well(lambda: load_density(path), f"checkpoints {number}")
        assert_ends_well(lambda: read_outline(path), f"checkpoints {number}, outline")
        if not isinstance(loaded, Exception):
            assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("numbers", CASES)
def test_checkpoints_with_a_wrong_value(density_run, tmp_path, numbers):
    checkpoint = torch.load(newest_checkpoint(density_run), weights_only=True)
    path = tmp_path / "wrong.ckpt"
    for number in numbers:
        wrong = damage_tree(checkpoint, seeded("wrong value", number))
        torch.save(wrong, path)
        loaded = assert_ends_well(lambda: load_density(path), f"wrong value {number}")
        assert isinstance(loaded, CheckpointError) or not is_changed(wrong)


@pytest.mark.parametrize("numbers", RESUMED)
def test_resuming_from_a_wrong_value(folder, numbers):
    path = newest_checkpoint(folder)
    checkpoint = torch.load(path, weights_only=True)
    untouched = shutil.copytree(folder, folder.parent / "untouched")
    for number in numbers:
        draw = seeded("resume", number)
        shutil.rmtree(folder)
        shutil.copytree(untouched, folder)
        wrong = damage_tree(checkpoint, draw)
        torch.save(wrong, path)
        result = assert_ends_well(lambda: resume(folder, quiet=True), f"resume {number}")
        assert isinstance(result, CheckpointError) or not is_changed(wrong)


def test_a_run_does_not_continue_from_a_state_of_unknown_origin(folder):
    path = newest_checkpoint(folder)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[DIGEST_KEY]
    torch.save(checkpoint, path)
    load_density(path)
    with pytest.raises(CheckpointError, match="has no digest, so another program or version wrote it"):
        resume(folder, quiet=True)


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_taken(density_run, tmp_path, capsys):
    folder = shutil.copytree(density_run, tmp_path / "run")
    path = newest_checkpoint(folder)
    tensor = torch.load(path, weights_only=True)["state_dict"]["density.model.log_scale"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(tensor) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is truncated or not a PyTorch checkpoint"):
        read_checkpoint(path)
    result = resume(folder)
    assert f"skipped  {path}, which cannot be read" in capsys.readouterr().out
    assert result.num_updates == 2


class Plant:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def replace_member(source: Path, target: Path, name: str, content: bytes) -> None:
    """Copy a file of `torch.save` with another content of one part."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, content if member.filename.endswith(name) else old.read(member))


def test_planted_code_does_not_run(density_run, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "planted.ckpt"
    original = newest_checkpoint(density_run)
    plants = [pickle.dumps(Plant(marker), protocol) for protocol in (0, 2, 4)]
    for plant in plants:
        path.write_bytes(plant)
        assert isinstance(assert_ends_well(lambda: load_density(path), "pickle"), CheckpointError)
        replace_member(original, path, "data.pkl", plant)
        assert isinstance(assert_ends_well(lambda: load_density(path), "data.pkl"), CheckpointError)
    torch.save({"state_dict": {"x": Plant(marker)}, "revnet": {}}, path)
    assert isinstance(assert_ends_well(lambda: load_density(path), "entry"), CheckpointError)
    assert not marker.exists()
    pickle.loads(plants[0])
    assert marker.exists()  # the plant works


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_planted_code_in_shards_does_not_run(tmp_path):
    marker, folder = tmp_path / "marker", tmp_path / "shards"
    state = {"state_dict": {"a.weight": torch.rand(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, "text": ["x"]}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"revnet": {"kind": "nice"}}, folder / "meta.pt")
    listed = folder / ".metadata"
    check_shards(folder, read_shard_metadata(listed))
    read_outline(folder)
    content = listed.read_bytes()
    for plant in (pickle.dumps(Plant(marker)), pickle.dumps({"x": Plant(marker)}, 2)):
        listed.write_bytes(plant)
        assert isinstance(assert_ends_well(lambda: read_outline(folder), "list"), CheckpointError)
    listed.write_bytes(content)
    planted = io.BytesIO()
    torch.save(Plant(marker), planted)
    place = next(place for index, place in read_shard_metadata(listed).storage_data.items() if index.fqn == "text")
    shard = folder / place.relative_path
    data = shard.read_bytes()
    listed_planted = content  # the list names the length of each part
    if len(planted.getvalue()) <= place.length:
        end = place.offset + place.length
        shard.write_bytes(data[: place.offset] + planted.getvalue().ljust(place.length, b"\0") + data[end:])
        listed.write_bytes(listed_planted)
        assert isinstance(assert_ends_well(lambda: read_outline(folder), "shard"), CheckpointError)
    assert not marker.exists()


def test_a_checkpoint_that_unpacks_to_gigabytes_is_refused(density_run, tmp_path):
    original, path = newest_checkpoint(density_run), tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            content = bytes(2**28) if member.filename.endswith("data/0") else old.read(member)
            new.writestr(member.filename, content)
    assert path.stat().st_size < 2**22
    assert isinstance(assert_ends_well(lambda: load_density(path), "bomb"), CheckpointError)
