"""Pieces of a long benchmark, kept in a folder so that a run can stop and go on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revnet._atomic_file import atomic_path


class Pieces:
    """Finished pieces and unfinished trainings in a folder.

    Args:
        folder: The folder, which is created. None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the piece with this name: the stored one, or else a new one.

        Args:
            name: Name of the piece.
            settings: What the piece depends on. A stored piece of other settings is computed again.
            compute: Function that computes the piece, as a dictionary for JSON.
        """
        stored = self.stored(name, settings)
        if stored is not None:
            return stored
        path, piece = self._path(name, "json"), compute()
        if path is not None:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps({"settings": settings, "piece": piece}))
            self.forget(name)
        print(f"finished {name}", file=sys.stderr, flush=True)
        return json.loads(json.dumps(piece))

    def stored(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the stored piece with this name, or None if there is none with these settings."""
        path = self._path(name, "json")
        if path is None or not path.exists():
            return None
        stored = json.loads(path.read_text())
        return stored["piece"] if stored["settings"] == json.loads(json.dumps(settings)) else None

    def load(
        self, name: str, settings: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Restore the state of an unfinished training and of the random numbers.

        Returns:
            The notes that were saved with it; empty if nothing was saved.
        """
        path = self._path(name, "pt")
        if path is None or not path.exists():
            return {}
        saved = torch.load(path)
        if saved["settings"] != settings:
            return {}
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        return saved["notes"]

    def save(
        self,
        name: str,
        settings: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        notes: dict[str, Any],
    ) -> None:
        """Store an unfinished training with its notes."""
        path = self._path(name, "pt")
        if path is None:
            return
        state = {"settings": settings, "notes": notes, "random": torch.get_rng_state()}
        with atomic_path(path) as temporary:
            torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)

    def forget(self, name: str) -> None:
        """Remove the unfinished training of a piece."""
        path = self._path(name, "pt")
        if path is not None:
            path.unlink(missing_ok=True)

    def _path(self, name: str, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.{suffix}"
