"""The checkpoints in the folder of a run: their names, the newest valid one, and the ones that are deleted."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revnet._atomic_file import sync_folder
from revnet.errors import CheckpointError
from revnet.training.run.checkpoint import read_outline

_NAME = re.compile(r"update-(\d{8,})\.ckpt")
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest checkpoint of a run that can be read."""

    path: Path
    """The checkpoint."""
    outline: Mapping[str, Any]
    """Its content, with tensors that have shapes, and no values in memory."""
    unreadable: Sequence[Path]
    """Newer checkpoints, which cannot be read."""


@dataclass(frozen=True)
class CheckpointFolder:
    """Folder of the checkpoints of a run.

    A checkpoint is a file, or a folder of shards. Both get their names once they are complete.
    """

    path: Path
    """The folder."""

    def file(self, update: int) -> Path:
        """Return the path of the checkpoint after `update` updates."""
        return self.path / f"update-{update:08d}.ckpt"

    def temporary(self, update: int) -> Path:
        """Return the path at which shards are written before their checkpoint is complete."""
        return self.path / f".update-{update:08d}.ckpt{_TEMPORARY}"

    def all(self) -> list[Path]:
        """Return all checkpoints, the oldest first."""
        if not self.path.is_dir():
            return []
        named = [(match, path) for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for match, path in sorted(named, key=lambda pair: int(pair[0][1]))]

    def newest(self) -> NewestCheckpoint | None:
        """Return the newest checkpoint that can be read; None if there are none at all.

        Raises:
            CheckpointError: There are checkpoints, but none can be read.
        """
        unreadable: list[Path] = []
        for path in reversed(self.all()):
            try:
                return NewestCheckpoint(path, read_outline(path), unreadable)
            except CheckpointError:
                unreadable.append(path)
        if unreadable:
            raise CheckpointError(
                f"no checkpoint in `{self.path}` can be read, and the newest is {unreadable[0].name}; restore a "
                "checkpoint, or start a new run in another folder."
            )
        return None

    def set_aside(self, path: Path) -> Path:
        """Rename a checkpoint that cannot be read, so that it counts as a checkpoint no longer, and return its path."""
        aside = path.with_name(f"{path.name}.damaged")
        delete_checkpoint(aside)
        return path.rename(aside)

    def complete(self, update: int) -> None:
        """Give the shards at the temporary path their name."""
        temporary, final = self.temporary(update), self.file(update)
        for file in temporary.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(temporary)
        delete_checkpoint(final)  # of a run that was continued from an earlier checkpoint
        temporary.rename(final)
        sync_folder(self.path)

    def prune(self, num_kept: int) -> None:
        """Delete all checkpoints but the newest."""
        for path in self.all()[:-num_kept]:
            delete_checkpoint(path)

    def remove_leftovers(self) -> None:
        """Delete what a process that was killed had begun to write."""
        for path in self.path.glob(f".*{_TEMPORARY}"):
            delete_checkpoint(path)


def update_of(checkpoint: Path) -> int:
    """Return the number of updates before a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, a file or a folder of shards, if there is one."""
    if path.is_dir():
        # Under another name first: a folder that lacks shards must not look like a checkpoint.
        hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.old{_TEMPORARY}"))
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)
