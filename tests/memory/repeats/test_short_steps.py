"""A model with many equal blocks is predicted from a few of them, to the byte."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from revnet import Checkpoint, Offload, PolicySequential, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.memory import measure, plan, predict
from revnet.memory.planning import _planner
from revnet.memory.repeats._block_chain import find_rows
from revnet.memory.repeats._frame import UNKNOWN, ZERO, Frame, Label
from revnet.memory.repeats._windows import WindowNumbers, positions_to_show
from revnet.memory.step import _predict
from revnet.memory.step._predict import Prediction
from revnet.models import ReversibleEncoderDecoder, ReversibleTransformer, ReversibleViT, RevNet

POLICIES = (Reverse(), Checkpoint(), Store(), Offload())
SHARED = nn.GELU()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def by_dimension(parameters):
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    rest = [parameter for parameter in parameters if parameter.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}])


def perceptron(width=4, hidden=6, dropout=0.1):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))


def network(num_blocks, make=perceptron):
    with torch.device("meta"):
        return nn.Sequential(
            PolicySequential(nn.Linear(3, 8)),
            ReversibleSequential(*[ReversibleBlock(make(), make()) for _ in range(num_blocks)]),
            nn.Linear(8, 2),
        )


def linear():
    """The activation is the same module everywhere."""
    return nn.Sequential(nn.Linear(4, 4), SHARED)


def conv():
    return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))


def conv_network(num_blocks):
    with torch.device("meta"):
        blocks = [ReversibleBlock(conv(), conv()) for _ in range(num_blocks)]
        return nn.Sequential(nn.Conv2d(3, 8, 1), ReversibleSequential(*blocks), nn.Flatten(), nn.Linear(128, 2))


IN_BACKWARD = {"optimizer": SGD, "step_in_backward": True, "dtype": torch.float64}
X = torch.empty(5, 3, device="meta")
IMAGES = torch.empty(2, 3, 4, 4, device="meta")


def assert_same(step, other):
    assert step == other
    for name in ("activation_bytes", "gradient_bytes", "module_indices"):
        assert np.array_equal(getattr(step.timeline, name), getattr(other.timeline, name)), name


@pytest.fixture
def steps(monkeypatch):
    """The objects that predictions have made to predict from fewer blocks."""
    found = []

    def remember(model, find=_predict.find_short_steps):
        found.append(find(model))
        return found[-1]

    monkeypatch.setattr(_predict, "find_short_steps", remember)
    return found


def predict_whole(model, x, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_predict, "find_short_steps", lambda model: None)
        return predict(model, x, **options)


def mixtures(num_blocks, seed):
    draw = random.Random(seed)
    yield [Reverse()] * num_blocks
    yield [policy for policy in POLICIES for _ in range(num_blocks // 4)]
    yield ([draw.choice(POLICIES) for _ in range(5)] * num_blocks)[:num_blocks]


@pytest.mark.parametrize(
    ("make", "x", "options"),
    [
        pytest.param(network, X, {"optimizer": by_dimension}, id="groups", marks=pytest.mark.slow),
        pytest.param(network, X, IN_BACKWARD, id="step in backward", marks=pytest.mark.slow),
        pytest.param(network, X, {"autocast": torch.bfloat16}, id="autocast", marks=pytest.mark.slow),
        pytest.param(conv_network, IMAGES, {"optimizer": SGD}, id="batch norm"),
    ],
)
def test_prediction_from_some_blocks_equals_prediction_of_all(steps, make, x, options):
    model = make(40)
    for policies in mixtures(40, seed=1):
        model[1].set_policies(policies)
        assert_same(predict(model, x, **options), predict_whole(model, x, **options))
    assert steps
    assert not any(found.is_refused for found in steps)


def test_dropout_of_everything_needs_no_mask(steps):
    """PyTorch multiplies by zero then, so the block is not equal to one that drops less."""
    rates = [0.1] * 39 + [1.0]
    blocks = [ReversibleBlock(perceptron(dropout=rate), perceptron()) for rate in rates]
    model, x = ReversibleSequential(*blocks, policy=Store()), torch.randn(5, 8)
    assert predict(model, x) == measure(model, x)
    assert not steps[0].is_refused


@pytest.mark.slow
def test_blocks_that_hold_and_keep_are_predicted_from_some(steps):
    """A held stream decides how far the walk overwrites a stream in place, however far away it is."""
    f, g, keep = Reverse(hold="f"), Reverse(hold="g"), Reverse(hold=("f", "g"), keep="f.linear.0")
    model = network(40)
    for policies in (
        [f] + [Reverse()] * 20 + [f] * 9 + [Checkpoint()] * 10,
        [Reverse()] * 12 + [g] * 12 + [keep] * 10 + [Store()] * 6,
        [f] * 14 + [Checkpoint()] * 5 + [keep] * 14 + [Reverse()] * 7,
    ):
        model[1].set_policies(policies)
        assert_same(predict(model, X), predict_whole(model, X))
    assert steps
    assert not any(short.is_refused for short in steps)


def freeze_half(model):
    for block in model[1].blocks[:20]:
        block.requires_grad_(False)


def widen_some(model):
    for index in (0, 20, 21):
        model[1].blocks[index].g = perceptron(hidden=9).to("meta")


def tie_two(model):
    model[1].blocks[7].f[0].weight = model[1].blocks[30].f[0].weight


def hook_one(model):
    model[1].blocks[9].f.register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize("change", [freeze_half, widen_some, tie_two, hook_one])
def test_models_with_some_other_blocks(change):
    model = network(56, make=linear)
    change(model)
    model[1].set_policies(["store"] * 10 + ["reverse"] * 46)
    assert_same(predict(model, X, optimizer=SGD), predict_whole(model, X, optimizer=SGD))


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = network(40, make=linear)[1]

    def forward(self, x):
        return self.blocks[3:](self.blocks[:3](x))


class Penalized(Sliced):
    def forward(self, x):
        y = self.blocks(x)
        return y.sum() + sum(parameter.square().sum() for parameter in self.parameters())


class OneWeight(Sliced):
    def forward(self, x):
        return self.blocks(x) + self.blocks[5].f[0].bias.sum()


@pytest.mark.parametrize("make", [Sliced, Penalized, OneWeight])
def test_all_blocks_run_if_the_model_depends_on_their_number(steps, make):
    model, x = make(), torch.empty(5, 8, device="meta")
    assert_same(predict(model, x), predict_whole(model, x))
    assert steps[0].is_refused


def assert_same_plan(planned, other):
    for name in ("memory", "time_ratio", "units", "points", "references", "is_exact"):
        assert getattr(planned, name) == getattr(other, name), name


@pytest.mark.parametrize(
    ("make", "x", "num_blocks", "budget"),
    [
        (conv_network, IMAGES, 12, "42KiB"),
        pytest.param(conv_network, IMAGES, 34, "105KiB", marks=pytest.mark.slow),
        pytest.param(conv_network, IMAGES, 60, "180KiB", marks=pytest.mark.slow),
        pytest.param(network, X, 60, "65KiB", marks=pytest.mark.slow),
        pytest.param(network, X, 10, "12KiB", marks=pytest.mark.slow),
    ],
)
def test_plan_from_some_blocks_equals_plan_of_all(monkeypatch, make, x, num_blocks, budget):
    model = make(num_blocks)
    planned = plan(model, x, budget=budget)
    assert len({unit.policy for unit in planned.units}) > 1
    monkeypatch.setattr(_planner, "find_short_steps", lambda model: None)
    assert_same_plan(planned, plan(model, x, budget=budget))


def test_plan_of_a_thousand_blocks_runs_few_of_them(monkeypatch):
    """Each of the probes and predictions would run 1,000 blocks."""
    num_run = []
    model = network(1000, make=partial(nn.Linear, 4, 4))
    run = Prediction._run_model

    def counting(prediction):
        num_run.append(len(model[1]))
        return run(prediction)

    monkeypatch.setattr(Prediction, "_run_model", counting)
    planned = plan(model, X, budget="1MiB")
    assert len(planned.units) == 1001
    assert planned.memory.parameter_bytes == sum(4 * parameter.numel() for parameter in model.parameters())
    assert max(num_run) < 60
    assert sum(num_run) < 600


# Parts ----------------------------------------------------------------------------------------------------------------


def test_shown_positions_have_all_windows():
    labels = list("abc" * 30 + "aab" * 5)
    numbers = WindowNumbers()
    windows = numbers.of(labels)
    shown = positions_to_show(windows, (), (0,), num_examples=2)
    assert len(shown) < len(labels) // 2
    assert set(windows) <= set(numbers.of([labels[index] for index in shown]))


def test_descriptions_lead_to_the_same_position_in_a_longer_chain():
    def frame(num_reversed):
        policies = [0, 0, *[1] * num_reversed, 0, 0]
        return Frame([Label("row", 0, policy) for policy in policies])

    own = np.array([1])
    descriptions = frame(6).describe(np.array([7]), own)  # from before a run to the last position of the run
    assert descriptions[0, 0] == UNKNOWN
    other = frame(7).describe(np.array([8]), own)
    common = np.where(descriptions == other, descriptions, UNKNOWN)
    assert frame(20).find(common, own).tolist() == [21]
    assert frame(20).find(np.where(np.arange(common.shape[1]) == 0, ZERO + 1, UNKNOWN)[None], own).tolist() == [2]


DEEP = {
    "transformer": lambda: ReversibleTransformer(vocab_size=9, dim=8, depth=40, num_heads=2),
    "transformer, leapfrog": lambda: ReversibleTransformer(vocab_size=9, dim=8, depth=40, num_heads=2, form="leapfrog"),
    "transformer, LSH": lambda: ReversibleTransformer(vocab_size=9, dim=8, depth=40, num_heads=2, attention="lsh"),
    "decoder": lambda: ReversibleEncoderDecoder(vocab_size=9, dim=8, encoder_depth=33, decoder_depth=34, num_heads=2),
    "ViT": lambda: ReversibleViT(img_size=8, patch_size=4, dim=8, depth=40, num_heads=2),
    "RevNet": lambda: RevNet(num_blocks=[40, 40, 40], widths=[8, 8, 8, 8]),
}


@pytest.mark.parametrize("name", DEEP)
def test_equal_blocks_of_library_models_are_known_as_equal(name):
    with torch.device("meta"):
        model = DEEP[name]()
    rows = find_rows(model)
    depths = [len(module) for module in model.modules() if isinstance(module, ReversibleSequential)]
    assert sorted(len(row.blocks) for row in rows.values()) == sorted(depths)
    assert all(len(set(row.kinds)) <= 2 for row in rows.values())
