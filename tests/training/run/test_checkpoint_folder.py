"""A checkpoint takes the place of an unreadable one of the same name, also of the other kind."""

import torch

from revnet.training.run.checkpoint_folder import CheckpointFolder
from revnet.training.run.checkpoint_io import AtomicCheckpointIO


def test_a_file_takes_the_place_of_shards(tmp_path):
    folder = CheckpointFolder(tmp_path)
    path = folder.file(60)
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"truncated")
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"update": 60}, path)
    assert writer.take_error() is None
    assert torch.load(path)["update"] == 60
    assert folder.all() == [path]


def test_shards_take_the_place_of_a_file(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.file(60).write_bytes(b"truncated")
    folder.temporary(60).mkdir()
    (folder.temporary(60) / "__0_0.distcp").write_bytes(b"whole")
    folder.complete(60)
    assert [file.read_bytes() for file in folder.file(60).iterdir()] == [b"whole"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.file(60).name]


def test_a_checkpoint_that_was_set_aside_does_not_count(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for update in (24, 27, 36):
        folder.file(update).write_bytes(b"")
    folder.file(36).with_name("update-00000036.ckpt.damaged").write_bytes(b"from before")
    aside = folder.set_aside(folder.file(36))
    assert aside.read_bytes() == b""
    folder.prune(1)
    assert folder.all() == [folder.file(27)]
    assert {path.name for path in tmp_path.iterdir()} == {folder.file(27).name, aside.name}
