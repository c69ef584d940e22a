import sys
from pathlib import Path

import pytest
import torch

from revnet.data import Preprocess
from revnet.training import LanguageConfig, NiceConfig, train
from revnet.training.classification.model import Classifier
from revnet.training.run.checkpoint import save_weights
from tests.damaged.damage import SEED
from tests.training.samples import make_header, write_text

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    return f"REVNET_DAMAGE_SEED={SEED}"


@pytest.fixture(scope="session")
def density_run(tmp_path_factory) -> Path:
    """Return the folder of a tiny run."""
    config = NiceConfig(
        batch_size=700,
        epochs=2,
        num_couplings=2,
        hidden_dim=4,
        num_hidden=1,
        out_dir=str(tmp_path_factory.mktemp("damaged") / "density"),
    )
    return train(config, quiet=True).folder


@pytest.fixture(scope="session")
def language_run(tmp_path_factory) -> Path:
    """Return the folder of a tiny run."""
    folder = tmp_path_factory.mktemp("damaged")
    config = LanguageConfig(
        data=write_text(folder),
        length=16,
        batch_size=4,
        dim=8,
        depth=1,
        num_heads=2,
        max_updates=2,
        out_dir=str(folder / "language"),
    )
    return train(config, quiet=True).folder


@pytest.fixture(scope="session")
def classifier_weights(tmp_path_factory) -> Path:
    """Return a file of random weights."""
    path = tmp_path_factory.mktemp("damaged") / "classifier.safetensors"
    header = make_header()
    preprocess = Preprocess(torch.full((3, 1, 1), 128.0), torch.full((3, 1, 1), 64.0))
    save_weights(Classifier.create(header, preprocess), path)
    return path
