"""Predictions leave no tensors without values behind, wherever the code of a model keeps what it computes."""

import collections
import functools
import pickle
import types
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from revnet import PolicySequential, PredictionError, ReversibleBlock, ReversibleSequential, apply_budget
from revnet.memory import max_batch_size, measure, plan, predict, predict_distributed


class Rope:
    """An object that caches a tensor, and is not a module."""

    cos = None

    def __call__(self, x):
        if self.cos is None or len(self.cos) < len(x):
            self.cos = torch.arange(len(x)).float().cos()[:, None]
        return self.cos[: len(x)]


class RopeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.rope = Rope()

    def forward(self, x):
        return x + self.linear(x) * self.rope(x)


def trains(model, x, loss=torch.sum):
    """Return whether a step of SGD changes the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    value = loss(model(x))
    assert type(value) is torch.Tensor
    value.backward()
    optimizer.step()
    return not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    "call",
    [
        predict,
        functools.partial(plan, budget="1MiB"),
        functools.partial(apply_budget, budget="1MiB"),
        functools.partial(max_batch_size, budget="1MiB"),
        functools.partial(predict_distributed, num_devices=2, strategy="ddp"),
    ],
    ids=["predict", "plan", "apply_budget", "max_batch_size", "predict_distributed"],
)
def test_a_model_trains_after_it(call):
    model, x = nn.Sequential(RopeBlock(), PolicySequential(RopeBlock())), torch.randn(8, 16)
    call(model, x)
    assert model[0].rope.cos is None
    assert trains(model, x)


def test_blocks_that_share_an_object():
    """Only some of the blocks run, and the others get fakes later."""
    rope = Rope()

    def half():
        block = RopeBlock()
        block.rope = rope
        return block

    model = ReversibleSequential(*[ReversibleBlock(half(), half()) for _ in range(40)])
    predict(model, torch.randn(8, 32))
    assert rope.cos is None


@dataclass
class Box:
    value: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    boxes: list
    value: Any = None


class Slotted:
    __slots__ = ("new", "value")

    def __init__(self):
        self.value = None


class Cycle:
    def __init__(self):
        self.itself = self
        self.value = None


class OnClass:
    table = {}  # noqa: RUF012
    value = None


class NotMine(dict):
    """A dict whose methods refuse changes, as outputs of transformers do."""

    def update(self, *_):
        raise TypeError

    def clear(self):
        raise TypeError


def set_item(box, value):
    box["a"] = value


PLACES = {
    "user dict": (collections.UserDict, set_item, dict),
    "strict dict": (NotMine, set_item, dict),
    "ordered dict": (lambda: collections.OrderedDict(b=1, c=2), lambda box, t: (box.pop("b"), set_item(box, t)), list),
    "bounded queue": (lambda: collections.deque([1, 2], 2), lambda box, t: box.append(t), list),
    "dataclass": (Box, lambda box, t: setattr(box, "value", t), lambda box: box.value),
    "namespace": (types.SimpleNamespace, lambda box, t: setattr(box, "a", t), vars),
    "object in a list": (lambda: [Box()], lambda box, t: setattr(box[0], "value", t), lambda box: box[0].value),
    "list in a frozen object": (lambda: (Frozen([]),), lambda box, t: box[0].boxes.append(t), lambda box: box[0].boxes),
    "slot": (Slotted, lambda box, t: (setattr(box, "value", t), setattr(box, "new", t)), lambda b: b.value),
    "new slot": (Slotted, lambda box, t: setattr(box, "new", t), lambda box: hasattr(box, "new")),
    "cycle": (Cycle, lambda box, t: setattr(box.itself.itself, "value", t), lambda box: box.value),
    "weak keys": (weakref.WeakKeyDictionary, lambda box, t: box.__setitem__(Box, t), dict),
    "dict of a class": (OnClass, lambda box, t: box.table.__setitem__(1, t), lambda box: dict(box.table)),
    "attribute of a class": (OnClass, lambda box, t: setattr(OnClass, "value", t), lambda box: OnClass.value),
    "new attribute of a class": (OnClass, lambda box, t: setattr(OnClass, "new", t), lambda _: hasattr(OnClass, "new")),
    "partial": (lambda: functools.partial(print, Box()), lambda p, t: setattr(p.args[0], "value", t), lambda p: p.args),
    "method": (lambda: Box().__eq__, lambda m, t: setattr(m.__self__, "value", t), lambda m: m.__self__.value),
    "module in a list": (lambda: [nn.BatchNorm1d(4)], lambda b, t: b[0].register_buffer("x", t), lambda b: vars(b[0])),
    "distribution": (
        lambda: torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        lambda box, _: box.covariance_matrix,
        lambda box: "covariance_matrix" in vars(box),
    ),
}


class Keeps(nn.Module):
    def __init__(self, box, keep):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.box = box
        self.keep = keep

    def forward(self, x):
        self.keep(self.box, torch.ones(16))
        return self.linear(x)


@pytest.mark.parametrize(("make", "keep", "read"), PLACES.values(), ids=PLACES.keys())
def test_places_where_code_keeps_tensors(make, keep, read):
    model = Keeps(make(), keep)
    before = repr(read(model.box))
    predict(model, torch.randn(8, 16))
    assert repr(read(model.box)) == before


def test_a_cache_of_the_class():
    class Table(nn.Module):
        cache = {}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            if len(x) not in self.cache:
                self.cache[len(x)] = torch.arange(len(x)).float()[:, None]
            return self.linear(x) * self.cache[len(x)]

    predict(Table(), torch.randn(8, 16))
    assert Table.cache == {}


class CenteredLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.box = Box()

    def forward(self, y):
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.box.value = y
        return (y - self.mean).square().mean()


@pytest.mark.parametrize("call", [predict, functools.partial(predict_distributed, num_devices=2, strategy="fsdp2")])
@pytest.mark.parametrize("kind", ["module", "method", "partial"])
def test_a_loss_that_keeps_tensors(call, kind):
    center = CenteredLoss()
    loss = {"module": center, "method": center.forward, "partial": functools.partial(center)}[kind]
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(8, 16)
    call(model, x, loss=loss)
    assert center.box.value is None
    pickle.dumps(center.state_dict())
    assert trains(model, x, loss)


def test_a_loss_is_on_the_device_of_the_model():
    with torch.device("meta"):
        model, loss, x = nn.Linear(16, 4), nn.CrossEntropyLoss(weight=torch.ones(4)), torch.empty(8, 16)
        labels = torch.empty(8, dtype=torch.long)

    class WithLabels(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = loss
            self.labels = labels

        def forward(self, logits):
            return self.loss(logits, self.labels)

    assert predict(model, x, loss=WithLabels()).peak_bytes > 0
    assert loss.weight.is_meta


def test_an_object_among_the_inputs():
    class Model(nn.Linear):
        def forward(self, x, cache):
            cache.value = x
            return super().forward(x)

    cache = Box()
    predict(Model(16, 16), torch.randn(8, 16), kwargs={"cache": cache})
    predict(Model(16, 16), torch.randn(8, 16), cache)
    assert cache.value is None


KEPT = r"the code of `model` \(=Linear\) keeps a tensor of shape \(8, 8\), which .* or run the model once before you "


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # by PyTorch, where real and fake tensors meet
@pytest.mark.parametrize(
    "call",
    [predict, *[functools.partial(predict_distributed, num_devices=1, strategy=name) for name in ("ddp", "fsdp2")]],
    ids=["predict", "ddp", "fsdp2"],
)
def test_warns_of_a_tensor_kept_elsewhere(call):
    @functools.lru_cache
    def mask(size):
        return torch.tril(torch.ones(size, size))

    class Masked(nn.Linear):
        def forward(self, x):
            return mask(len(x)) @ super().forward(x)

    Masked.__name__ = "Linear"
    model, x = Masked(16, 16), torch.randn(8, 16)
    with pytest.warns(UserWarning, match=KEPT):
        call(model, x)
    with pytest.raises(
        PredictionError, match=r"the output of `model` \(=Linear\) has no values.* clear the global var"
    ):
        measure(model, x)
    mask.cache_clear()
    assert trains(model, x)
    call(model, x)  # Now the cache has a real tensor.
    assert trains(model, x)


@pytest.mark.parametrize("make", [lambda model, x: model.weight, lambda model, x: x, lambda model, x: REAL[:2]])
def test_warns_of_views_and_parameters(make):
    kept = []

    class Linear(nn.Linear):
        def forward(self, x):
            kept.append(make(self, x))
            return super().forward(x)

    with pytest.warns(UserWarning, match=r"the code of `model` \(=Linear\) keeps a tensor of shape"):
        predict(Linear(16, 16), torch.randn(8, 16))
    assert isinstance(kept[0], FakeTensor)


REAL = torch.ones(4)


def test_does_not_warn_of_cycles():
    class Linear(nn.Linear):
        def forward(self, x):
            cycle = [super().forward(x)]
            cycle.append(cycle)
            return cycle[0]

    predict(Linear(16, 16), torch.randn(8, 16))
