"""Training a language model whose loss works on some logits at a time."""

import random

import pytest

from revnet.errors import BudgetError
from revnet.training import LanguageConfig, load_language_model, train
from revnet.training.language.job import new_job
from tests.training.samples import assert_same_run, read_log, train_and_resume

NUM_CHARACTERS = 400
SMALL = {
    "length": 16,
    "depth": 1,
    "dim": 16,
    "num_heads": 2,
    "batch_size": 8,
    "epochs": 1,
    "updates_per_epoch": 3,
    "val_windows": 8,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text with more characters than the model has features."""
    path = tmp_path_factory.mktemp("texts") / "signs.txt"
    characters = [chr(0x4E00 + index) for index in range(NUM_CHARACTERS)]
    path.write_text("".join(characters + random.Random(0).choices(characters, k=3000)), encoding="utf-8")
    return str(path)


def run(text, folder, **settings):
    return train(LanguageConfig(data=text, out_dir=str(folder), **SMALL | settings), quiet=True)


def test_is_chosen_by_the_number_of_characters(text):
    def head(**settings):
        return new_job(LanguageConfig(data=text, **SMALL | settings)).task.language_model.model.head

    assert head().is_chunked
    assert not head(dim=NUM_CHARACTERS // 2).is_chunked
    assert not head(chunked_loss=False).is_chunked
    assert head(dim=NUM_CHARACTERS // 2, chunked_loss=True).is_chunked


def test_losses_equal_whole_logits(text, tmp_path):
    whole, chunked = (run(text, tmp_path / str(choice), chunked_loss=choice) for choice in (False, True))
    for name in ("train_loss", "val_loss"):
        losses = [float(read_log(result.folder)[0][name]) for result in (whole, chunked)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert chunked.peak_bytes < whole.peak_bytes
    model = load_language_model(chunked.folder)
    assert len(model.generate(model.vocabulary.characters[0], 5)) == 5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_stopped_run_resumes_bit_for_bit(text, tmp_path, monkeypatch, precision):
    config = LanguageConfig(data=text, **SMALL | {"epochs": 2, "precision": precision, "dropout": 0.1})
    straight, resumed = train_and_resume(config, tmp_path, monkeypatch, stop_after=1)
    assert_same_run(straight, resumed)


@pytest.mark.slow  # the tests of `revnet plan` and of the planner choose chunks, too
def test_plan_for_a_budget_chooses(text):
    """Of the settings that fit, a plan takes what it estimates to be fastest, which is whole logits if they fit."""

    def plan(budget, **settings):
        job = new_job(LanguageConfig(data=text, memory_budget=budget, **SMALL | settings))
        assert job.plan.chunked_loss in (None, job.task.language_model.model.head.is_chunked)
        return job.plan

    ample = plan("1GiB")
    assert ample.chunked_loss is False
    tight = plan("750KiB")
    assert tight.chunked_loss is True
    assert tight.peak_bytes <= 750 * 2**10 < ample.peak_bytes
    with pytest.raises(BudgetError, match="`memory_budget`"):
        plan("750KiB", chunked_loss=False)


@pytest.mark.slow
# PyTorch's compiler uses deprecated functions, and makes an instance of every `autograd.Function`.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_run(text, tmp_path):
    eager, compiled = (run(text, tmp_path / str(choice), compile=choice) for choice in (False, True))
    assert eager.val_loss == pytest.approx(compiled.val_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_run_on_two_devices(text, tmp_path, strategy):
    options = {"device": "cpu", "strategy": strategy}
    alone, together = (run(text, tmp_path / str(count), devices=count, **options) for count in (1, 2))
    assert alone.val_loss == pytest.approx(together.val_loss, rel=1e-4)


def test_rejects_other_values():
    with pytest.raises(TypeError, match=r"`chunked_loss` \(='auto'\) must be"):
        LanguageConfig(chunked_loss="auto")
