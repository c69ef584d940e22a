import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from revnet.data import load_dataset
from revnet.training import LanguageConfig, TrainConfig, load_classifier, load_language_model, train
from tests.training.samples import TINY, assert_same_run, train_and_resume, write_text


@pytest.fixture
def language(tmp_path):
    return {
        "data": write_text(tmp_path),
        "length": 16,
        "depth": 1,
        "dim": 16,
        "num_heads": 2,
        "batch_size": 4,
        "val_windows": 4,
    }


class Weights(Callback):
    """Keep the weights after each update."""

    def __init__(self):
        self.history = []

    def on_train_batch_end(self, trainer, module, *args):
        model = module.saved_module.model
        self.history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def averaged(history, name, decay):
    average = history[0][name].clone()
    for count, weights in enumerate(history[1:], start=1):
        average = average.lerp(weights[name], 1 - min(decay, (1 + count) / (10 + count)))
    return average


def test_saves_the_average_of_the_weights(out_dir):
    watch = Weights()
    config = TrainConfig(model=TINY, batch_size=200, epochs=1, ema_decay=0.5, out_dir=out_dir)
    result = train(config, quiet=True, callbacks=[watch])
    saved = load_file(result.folder / "last.safetensors")
    for name, last in watch.history[-1].items():
        # Each step rounds once, in another order under `foreach`.
        expected = averaged(watch.history, name, 0.5) if last.is_floating_point() else last
        torch.testing.assert_close(saved[f"model.{name}"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(saved["model.head.weight"], watch.history[-1]["head.weight"])


def test_validates_the_average(out_dir):
    config = TrainConfig(model=TINY, batch_size=200, epochs=2, ema_decay=0.9, out_dir=out_dir)
    result = train(config, quiet=True)
    model = load_classifier(result.folder / "best.safetensors", model=tiny())
    _, validation = load_dataset("digits").holdout(0.1, 0)
    answers = model(validation.images).argmax(1)
    assert float((answers == validation.labels).float().mean()) == pytest.approx(result.best_val_accuracy)


def tiny():
    from tests.training.own_code import tiny_revnet

    return tiny_revnet(10, 1)


def test_constant_buffers_stay_as_they_are(out_dir):
    config = TrainConfig(model="revnet38", batch_size=400, epochs=1, ema_decay=0.7, out_dir=out_dir)
    saved = load_file(train(config, quiet=True).folder / "last.safetensors")
    counts = {int(tensor) for name, tensor in saved.items() if name.endswith("num_batches_tracked")}
    assert counts <= {3}, "counters are copied"


def test_accumulated_parts_are_averaged_once(language, out_dir):
    watch = Weights()
    config = LanguageConfig(**language, accumulate=2, max_updates=3, ema_decay=0.5, out_dir=out_dir)
    result = train(config, quiet=True, callbacks=[watch])
    after_updates = watch.history[1::2]
    assert len(after_updates) == 3
    expected = averaged(after_updates, "head.weight", 0.5)
    saved = load_language_model(result.folder).model.head.weight
    torch.testing.assert_close(saved.detach(), expected, rtol=1e-5, atol=1e-6)


def test_run_with_an_average_resumes_bit_for_bit(language, tmp_path, monkeypatch):
    more = {"epochs": 4, "updates_per_epoch": 3, "ema_decay": 0.9, "schedule": "plateau", "plateau_patience": 0}
    config = LanguageConfig(**language, **more, accumulate=2, precision="16-mixed", val_every=2)
    straight, resumed = train_and_resume(config, tmp_path, monkeypatch, stop_after=2)
    assert_same_run(straight, resumed)


def test_checkpoint_within_a_validation_keeps_both_weights():
    from revnet.training.run.weight_average import WeightAverage

    source, target = WeightAverage(0.5), WeightAverage(0.5)
    model = torch.nn.Linear(2, 2)
    source._model, source._average = model, torch.optim.swa_utils.AveragedModel(model)
    source._average.module.weight.data.fill_(3)
    trained = model.weight.detach().clone()
    source._swap()
    state = source.state_dict()
    restored = torch.nn.Linear(2, 2)
    restored.load_state_dict(model.state_dict())
    target._model, target._average = restored, torch.optim.swa_utils.AveragedModel(restored)
    target._average.load_state_dict(state["average"])
    target._is_swapped = state["is_swapped"]
    target._restore()
    assert torch.equal(restored.weight, trained)
    assert torch.equal(target._average.module.weight, torch.full((2, 2), 3.0))


class FailsAtTheEnd(Callback):
    def on_fit_end(self, trainer, module):
        raise RuntimeError("the disk of the results is full")


def test_an_error_after_training_is_not_replaced(out_dir):
    config = TrainConfig(model=TINY, batch_size=800, epochs=1, ema_decay=0.9, out_dir=out_dir)
    with pytest.raises(RuntimeError, match=r"^the disk of the results is full$"):
        train(config, quiet=True, callbacks=[FailsAtTheEnd()])
