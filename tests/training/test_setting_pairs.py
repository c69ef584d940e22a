"""Settings of the recipe in all pairs: each trains for two updates, or is refused in one line."""

from itertools import combinations
from typing import Any

import pytest

from revnet.training import LanguageConfig, NiceConfig, TrainConfig, train
from tests.training.samples import TINY, write_text

Settings = dict[str, Any]

SHARED: dict[str, Settings] = {
    "accumulate": {"accumulate": 2},
    "norm": {"max_grad_norm": 1.0},
    "value": {"max_grad_norm": None, "max_grad_value": 0.1},
    "average": {"ema_decay": 0.9},
    "plateau": {"schedule": "plateau", "warmup": 0.4, "plateau_patience": 0},
    "restarts": {"schedule": "restarts", "num_cycles": 2, "cycle_growth": 2},
    "constant": {"schedule": "constant"},
    "float16": {"precision": "16-mixed"},
    "bfloat16": {"precision": "bf16-true"},
    "autocast": {"precision": "bf16-mixed"},
    "validation": {"val_every": 1, "patience": 1},
    "deterministic": {"deterministic": True},
    "profile": {"profile": True},
    "stored": {"policy": "store"},
    "adafactor": {"optimizer": "adafactor", "lr": 1e-3},
    "rmsprop": {"optimizer": "rmsprop", "lr": 1e-3, "beta2": 0.9, "eps": 1e-6},
    "backward": {"max_grad_norm": None, "step_in_backward": True},
    "sgd": {"optimizer": "sgd", "nesterov": True, "lr": 1e-3},
}
MUON = {"muon": {"optimizer": "muon", "lr": 1e-3}}
FAMILIES: dict[str, tuple[type, Settings, dict[str, Settings]]] = {
    "classifier": (
        TrainConfig,
        {"batch_size": 16, "model": TINY},
        {
            **SHARED,
            "freeze": {"freeze": "stem,stages.0*"},
            "mixup": {"mixup": 0.2, "cutmix": 1.0},
            "weights": {"class_weights": "balanced"},
            "sampling": {"balanced_sampling": True},
            "smoothing": {"label_smoothing": 0.1},
            "exact": {"exact": True},
            "drift": {"drift_every": 1},
            "size": {"start_size": 4},
        },
    ),
    "density": (
        NiceConfig,
        {"batch_size": 16, "num_couplings": 2, "hidden_dim": 16, "num_hidden": 1},
        {**SHARED, **MUON, "freeze": {"freeze": "*.f.0"}},
    ),
    "language": (
        LanguageConfig,
        {"batch_size": 4, "length": 16, "depth": 1, "dim": 16, "num_heads": 2, "val_windows": 4},
        {**SHARED, **MUON, "freeze": {"freeze": "embedding"}, "dropout": {"dropout": 0.1}},
    ),
}


def is_allowed(kind: type, settings: Settings) -> bool:
    """Return whether the settings go together; a refusal is one line."""
    try:
        kind(**settings)
    except ValueError as error:
        if "\n" in str(error):
            raise
        return False
    return True


def merged(settings: list[Settings]) -> Settings | None:
    """Return all settings together, None if two of them differ."""
    together: Settings = {}
    for part in settings:
        if any(together.get(name, value) != value for name, value in part.items()):
            return None
        together |= part
    return together


def covering_runs(kind: type, base: Settings, named: dict[str, Settings]) -> list[tuple[str, ...]]:
    """Return few sets of settings in which every allowed pair occurs."""

    def fits(names: tuple[str, ...]) -> bool:
        together = merged([named[name] for name in names])
        return together is not None and is_allowed(kind, base | together)

    pairs = {pair for pair in combinations(named, 2) if fits(pair)}
    runs = []
    while pairs:
        run: tuple[str, ...] = min(pairs)
        for _ in named:
            gains = {
                name: sum((other, name) in pairs or (name, other) in pairs for other in run)
                for name in named
                if name not in run and fits((*run, name))
            }
            best = max(gains, key=lambda name: gains[name], default=None)
            if best is None or gains[best] == 0:
                break
            run = (*run, best)
        pairs -= {pair for first in run for second in run for pair in [(first, second)]}
        runs.append(run)
    return runs


@pytest.mark.parametrize("family", ["classifier", pytest.param("density", marks=pytest.mark.slow), "language"])
def test_all_pairs_of_settings_train(family, tmp_path):
    kind, base, named = FAMILIES[family]
    if family == "language":
        base = base | {"data": write_text(tmp_path)}
    for number, run in enumerate(covering_runs(kind, base, named)):
        settings = base | merged([named[name] for name in run]) | {"max_updates": 2}
        try:
            result = train(kind(**settings, out_dir=str(tmp_path / str(number))), quiet=True)
        except Exception as error:
            error.add_note(f"settings: {', '.join(run)}")
            raise
        assert 1 <= result.num_updates <= 2
