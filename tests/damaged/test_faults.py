"""A fault inside revnet keeps its traceback: only what the user or the machine causes prints one line."""

import pytest

from revnet.cli.main import main
from tests.data.samples import write_image


class FaultError(Exception):
    """A fault that nothing expects."""


FAULTS = [ZeroDivisionError, AssertionError, KeyError, AttributeError, IndexError, NameError, FaultError]


def fail_with(fault):
    def fail(*_arguments, **_options):
        raise fault("planted")

    return fail


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "name",
    [
        "revnet.training.classification.model.load_module",
        "revnet.models.pretrained.tensor_file.is_damaged",
        "revnet.models.pretrained.tensor_file.name_in_utf8",
        "revnet.training.saved_module.first_difference",
        "revnet.training.saved_module.build_outline",
        "revnet.training.evaluation.predict_images.write_csv",
        "revnet.training.evaluation.predict_images.csv_cell",
        "revnet._atomic_file.sync_folder",
    ],
)
def test_a_fault_in_a_command_shows_its_traceback(classifier_weights, tmp_path, monkeypatch, name, fault):
    image = tmp_path / "x.png"
    write_image(image)
    monkeypatch.setattr(name, fail_with(fault))
    with pytest.raises(fault, match="planted"):
        main(["predict", str(classifier_weights), str(image), "--csv", str(tmp_path / "x.csv")])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("revnet.training.run.callbacks.write_table", ZeroDivisionError),
        ("revnet.models.pretrained.tensor_file.hash_weights", KeyError),
        ("revnet.training.run.learning_curve.plain", AttributeError),
        ("revnet.training.run.run_result.write_text", FaultError),
        ("revnet.training.run.checkpoint_io.digest_state", IndexError),
        ("revnet.data.loading.loader.check_shared_memory", AssertionError),
    ],
)
def test_a_fault_in_a_run_shows_its_traceback(tmp_path, monkeypatch, name, fault):
    monkeypatch.setattr(name, fail_with(fault))
    words = ["train", "nice", "--epochs", "1", "--batch-size", "1000", "--hidden-dim", "4", "--num-hidden", "1"]
    with pytest.raises(fault, match="planted"):
        main([*words, "--num-couplings", "2", "--out-dir", str(tmp_path / "run")])
