"""Training the forms and the options of the transformer, and generating with them."""

import csv

import pytest
import torch

from revnet.memory import measure
from revnet.training import LanguageConfig, load_language_model, train
from tests.training.samples import assert_same_run, train_and_resume

SMALL = {
    "length": 16,
    "depth": 2,
    "dim": 16,
    "num_heads": 2,
    "batch_size": 4,
    "epochs": 1,
    "updates_per_epoch": 3,
    "val_windows": 4,
    "num_threads": 1,
}
RHYME = "Hickory, dickory, dock, the mouse ran up the clock.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "rhyme.txt"
    path.write_text(RHYME * 40)
    return str(path)


FORMS = {
    "midpoint": {"form": "midpoint", "drift_every": 2},
    "midpoint-exact": {"form": "midpoint", "step_size": 0.25, "exact": True, "drift_every": 2},
    "leapfrog": {"form": "leapfrog", "drift_every": 1, "precision": "bf16-mixed"},
    "stored": {"form": "stored", "policy": "checkpoint"},
    "llama": {"num_kv_heads": 1, "norm": "rms", "mlp": "swiglu", "bias": False, "tie_embeddings": True},
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=() if name == "midpoint-exact" else pytest.mark.slow)
        for name, settings in FORMS.items()
    ],
)
def test_a_run_keeps_its_form(tmp_path, text, settings):
    result = train(LanguageConfig(data=text, out_dir=str(tmp_path / "run"), **SMALL | settings), quiet=True)
    model = load_language_model(result.folder)
    assert model.model.form == settings.get("form", "coupled")
    assert model.header.options.get("exact", False) == settings.get("exact", False)
    cached, plain = (model.generate("the ", 40, temperature=0, use_cache=use) for use in (None, False))
    assert cached == plain
    if "drift_every" not in settings:
        assert not (result.folder / "drift.csv").exists()
        return
    rows = list(csv.DictReader((result.folder / "drift.csv").read_text().splitlines()))
    assert {row["update"] for row in rows} == ({"0", "2"} if settings["drift_every"] == 2 else {"0", "1", "2"})
    assert all((float(row["error"]) == 0) == settings.get("exact", False) for row in rows)


@pytest.mark.slow
def test_default_header_has_no_new_entries(tmp_path, text):
    result = train(LanguageConfig(data=text, out_dir=str(tmp_path / "run"), **SMALL), quiet=True)
    assert load_language_model(result.folder).header.options.keys() == {
        *("dim", "depth", "num_heads", "max_length", "attention", "ff_mult", "ff_chunks", "dropout")
    }


@pytest.mark.slow
def test_a_run_counts_its_bytes(tmp_path, text):
    settings = SMALL | FORMS["midpoint"]
    result = train(LanguageConfig(data=text, out_dir=str(tmp_path / "run"), **settings), quiet=True)
    model = load_language_model(result.folder).model.train()
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    assert result.peak_bytes == measure(model, tokens, kwargs={"targets": tokens}).activation_bytes


@pytest.mark.slow
def test_a_plan_of_an_ordinary_transformer(tmp_path, text):
    settings = SMALL | {"form": "stored", "memory_budget": "230KiB"}
    result = train(LanguageConfig(data=text, out_dir=str(tmp_path / "run"), **settings), quiet=True)
    assert (result.folder / "plan.txt").exists()


@pytest.mark.slow
def test_a_run_of_another_form_resumes_bit_for_bit(tmp_path, monkeypatch, text):
    config = LanguageConfig(data=text, **SMALL | {"form": "leapfrog", "epochs": 2, "drift_every": 2})
    assert_same_run(*train_and_resume(config, tmp_path, monkeypatch, stop_after=1))


@pytest.mark.slow
def test_weights_of_an_untied_model_start_a_model_of_other_characters(tmp_path, text):
    first = train(LanguageConfig(data=text, out_dir=str(tmp_path / "1"), **SMALL | {"bias": False}), quiet=True).folder
    other = tmp_path / "other.txt"
    other.write_text("the clock is slow " * 60)
    settings = SMALL | {"bias": False, "weights": str(first), "max_updates": 1}
    train(LanguageConfig(data=str(other), out_dir=str(tmp_path / "2"), **settings), quiet=True)


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lm"
    settings = SMALL | {"updates_per_epoch": 40, "lr": 1e-2}
    return load_language_model(train(LanguageConfig(data=text, out_dir=str(folder), **settings), quiet=True).folder)


def test_continues_several_prompts(model):
    prompts = ["the ", "Hickory, d", "m"]
    texts = model.generate(prompts, 30, temperature=0)
    assert texts == [model.generate(prompt, 30, temperature=0) for prompt in prompts]
    ended = model.generate(prompts, 30, temperature=0, stop="o")
    assert ended == [text.partition("o")[0] for text in texts]
    assert model.generate("the ", 30, temperature=0, stop="o") == ended[0]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (["the", ""], {}, r"`prompt` \(=\['the', ''\]\) must not be empty"),
        ([], {}, r"`prompt` \(=\[\]\) must not be empty"),
        ("the", {"stop": "th"}, r"`stop` \(='th'\) must be one character of the vocabulary"),
        ("the", {"stop": ""}, r"`stop` \(=''\) must be one character"),
        ("the", {"stop": "Z"}, r"`stop` has the character 'Z', which is not among"),
        ("the", {"use_cache": True, "num_new": 60}, r"`use_cache` \(=True\) must be None for 62 positions"),
    ],
)
def test_rejects_invalid_prompts(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **{"num_new": 3, **options})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "forward"}, r"`form` \(='forward'\) must be `coupled` or `midpoint` or `leapfrog` or `stored`"),
        ({"step_size": 0.5}, r"`step_size` \(=0.5\) is for the forms `midpoint` and `leapfrog`"),
        ({"form": "stored", "exact": True}, r"`exact` \(=True\) is for forms that are reversed"),
        ({"form": "stored", "drift_every": 5}, r"`drift_every` \(=5\) is for forms that are reversed"),
        ({"form": "stored", "hold": "f"}, r"`hold` \(='?f'?\) is for forms that are reversed"),
        ({"num_kv_heads": 3}, r"`num_kv_heads` \(=3\) must divide `num_heads` \(=4\)"),
        ({"num_kv_heads": 2, "attention": "lsh"}, r"`num_kv_heads` \(=2\) must be left out for `lsh`"),
    ],
)
def test_rejects_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageConfig(data="book.txt", **settings)
