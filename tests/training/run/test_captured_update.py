"""Runs with `cuda_graphs`, on a simulated graph: results stay in place, and a capture computes nothing."""

import math
import random
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn

from revnet.training import LanguageConfig, NiceConfig, TrainConfig, train
from revnet.training.processes import prepare_model
from revnet.training.processes.world import World
from revnet.training.run import execute
from revnet.training.run.captured_update import NUM_WARMUPS, CapturedUpdate
from tests.training.samples import TINY, write_text

TINY_RUN = {"model": TINY, "epochs": 2, "batch_size": 200, "seed": 1}


class FakeGraphs:
    """Captures functions like CUDA graphs do: a replay writes to the memory of the capture."""

    def __init__(self):
        self.num_captures = self.num_replays = 0

    def __call__(self, passes):
        self.num_captures += 1
        names = dict(zip(passes.__code__.co_freevars, (cell.cell_contents for cell in passes.__closure__), strict=True))
        update = names["self"]
        parameters = [parameter for parameter in update._module.parameters() if parameter.requires_grad]
        buffers, state = [buffer.clone() for buffer in update._module.buffers()], torch.get_rng_state()
        passes()
        torch.set_rng_state(state)
        for buffer, value in zip(update._module.buffers(), buffers, strict=True):
            buffer.data.copy_(value)
        outputs, gradients = update._outputs, [parameter.grad for parameter in parameters]
        for tensor in (*outputs, *gradients):  # a capture computes nothing
            tensor.fill_(math.nan)

        def replay():
            self.num_replays += 1
            before = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            passes()
            for static, value in zip(outputs, update._outputs, strict=True):
                static.copy_(value)
            for static, parameter, grad in zip(gradients, parameters, before, strict=True):
                static.copy_(parameter.grad)
                parameter.grad = grad
            update._outputs = outputs

        return replay


@pytest.fixture
def graphs(monkeypatch):
    """Let a CPU have CUDA graphs."""
    fake = FakeGraphs()
    monkeypatch.setattr(execute, "CapturedUpdate", partial(CapturedUpdate, capture=fake))
    monkeypatch.setattr(prepare_model, "find_device", lambda name: torch.device("cuda"))
    return fake


def weights(config):
    return load_file(train(config, quiet=True).folder / "last.safetensors")


def assert_same_weights(kind, settings, tmp_path):
    captured = weights(kind(**settings, cuda_graphs=True, out_dir=str(tmp_path / "captured")))
    eager = weights(kind(**settings, out_dir=str(tmp_path / "eager")))
    assert captured.keys() == eager.keys()
    for name, tensor in captured.items():
        assert torch.equal(tensor, eager[name]), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"max_grad_norm": 0.5, "ema_decay": 0.9, "label_smoothing": 0.1},
        {"precision": "bf16-mixed", "mixup": 0.2, "optimizer": "adamw", "lr": 1e-3},
        {"max_grad_norm": None, "max_grad_value": 0.01, "policy": "store", "schedule": "constant"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_classifier_equals_the_eager_run(graphs, tmp_path, options):
    """The last batch of each epoch is smaller, and runs without the graph."""
    assert_same_weights(TrainConfig, TINY_RUN | options, tmp_path)
    num_updates = 2 * math.ceil(0.9 * 1437 / 200)  # of which one per epoch is smaller
    assert graphs.num_captures == 1
    assert graphs.num_replays == num_updates - 2 - NUM_WARMUPS


def test_language_model_with_dropout_equals_the_eager_run(graphs, tmp_path):
    sizes = {"length": 16, "depth": 2, "dim": 16, "num_heads": 2, "batch_size": 4, "val_windows": 4}
    settings = {"data": write_text(tmp_path), **sizes, "dropout": 0.2, "epochs": 1, "max_updates": 8, "val_every": 5}
    assert_same_weights(LanguageConfig, settings, tmp_path)
    assert graphs.num_replays == 8 - NUM_WARMUPS


def test_density_equals_the_eager_run(graphs, tmp_path):
    settings = {"num_couplings": 2, "hidden_dim": 16, "num_hidden": 1, "batch_size": 16, "max_updates": 8}
    assert_same_weights(NiceConfig, settings, tmp_path)
    assert graphs.num_replays == 8 - NUM_WARMUPS


class MoveWeights(Callback):
    """Puts the parameters into other memory after some updates."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == NUM_WARMUPS + 2:
            for parameter in module.saved_module.model.parameters():
                parameter.data = parameter.data.clone()


def test_captures_again_if_parameters_have_moved(graphs, tmp_path):
    settings = TINY_RUN | {"batch_size": 100, "epochs": 1}
    results = []
    for captures in (True, False):
        config = TrainConfig(**settings, cuda_graphs=captures, out_dir=str(tmp_path / str(captures)))
        result = train(config, quiet=True, callbacks=[MoveWeights()])
        results.append(load_file(result.folder / "last.safetensors"))
    assert graphs.num_captures == 2
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


class HostNoise(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = nn.Linear(3, 3), draw

    def forward(self, x):
        return self.linear(x) * float(self.draw())


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(())], ids=["python", "pytorch"])
def test_random_numbers_of_the_host_raise(draw):
    module = HostNoise(draw)

    def capture(passes):
        passes()
        return passes

    update = CapturedUpdate(lambda x: (module(x).sum(),), module, capture)
    for _ in range(NUM_WARMUPS):
        update.run(torch.randn(2, 3))
    with pytest.raises(ValueError, match="draws random numbers on the CPU, which a CUDA graph would repeat"):
        update.run(torch.randn(2, 3))


class Replacing(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return super().forward(x) * self.count


def test_a_replaced_buffer_raises():
    module = Replacing()
    update = CapturedUpdate(lambda x: (module(x).sum(),), module, lambda passes: passes() or passes)
    for _ in range(NUM_WARMUPS):
        update.run(torch.randn(2, 3))
    with pytest.raises(ValueError, match="replaces a buffer by another tensor"):
        update.run(torch.randn(2, 3))


def test_a_network_that_cannot_be_captured_raises():
    module = nn.Linear(3, 3)

    def capture(passes):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nlong story")

    update = CapturedUpdate(lambda x: (module(x).sum(),), module, capture)
    for _ in range(NUM_WARMUPS):
        update.run(torch.randn(2, 3))
        assert not update.put_gradients()
    with pytest.raises(ValueError, match=r"cannot be captured in a CUDA graph \(CUDA error: operation not permitted"):
        update.run(torch.randn(2, 3))


def test_batches_without_tensors_run_as_usual():
    module = nn.Linear(3, 3)
    update = CapturedUpdate(lambda batch: (module(batch[0]).sum(),), module, pytest.fail)
    for _ in range(NUM_WARMUPS + 1):
        update.run((torch.randn(2, 3), "a name"))


def test_needs_a_gpu(tmp_path):
    config = TrainConfig(**TINY_RUN, cuda_graphs=True, device="auto", out_dir=str(tmp_path / "run"))
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"`cuda_graphs` \(=True\) needs a CUDA GPU, and the device is cpu; leave it"):
        train(config, quiet=True)
    assert not (tmp_path / "run").exists()


def test_needs_a_single_process(monkeypatch):
    monkeypatch.setattr(prepare_model, "find_device", lambda name: torch.device("cuda"))
    config = TrainConfig(**TINY_RUN, cuda_graphs=True)
    with pytest.raises(ValueError, match="is for a single process, and there are 2"):
        prepare_model.check_processes(config, World(num_processes=2))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_a_gpu_equals_the_eager_run(tmp_path, precision):
    settings = TINY_RUN | {"device": "cuda", "precision": precision, "deterministic": True, "batch_size": 100}
    assert_same_weights(TrainConfig, settings, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu_dropout_equals_the_eager_run(tmp_path):
    sizes = {"length": 64, "depth": 2, "dim": 64, "num_heads": 2, "batch_size": 8, "val_windows": 4}
    settings = {"data": write_text(tmp_path), **sizes, "dropout": 0.2, "epochs": 1, "max_updates": 12}
    assert_same_weights(LanguageConfig, settings | {"device": "cuda", "deterministic": True}, tmp_path)
