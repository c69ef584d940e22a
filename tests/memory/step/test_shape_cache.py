"""The cache returns what PyTorch returns on fake tensors: shapes, strides, types, and which tensors share memory."""

import pytest
import torch
from torch import nn

from revnet._torch_internals import FakeTensor, FakeTensorMode
from revnet.memory import measure, predict
from revnet.memory.step import _cpu_kernels, _shape_cache
from revnet.memory.step._cpu_kernels import CpuKernels
from revnet.memory.step._shape_cache import ShapeCache


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(_cpu_kernels, "_SHAPES", ShapeCache())


@pytest.fixture
def ran(monkeypatch):
    """The names of the operations that the cache did not know."""
    names = []
    run = CpuKernels._run
    monkeypatch.setattr(CpuKernels, "_run", lambda self, func, *rest: names.append(str(func)) or run(self, func, *rest))
    return names


def described(value, args):
    if isinstance(value, torch.Tensor):
        assert type(value) is FakeTensor
        place = next((index for index, arg in enumerate(args) if value is arg), None)
        storage = value.untyped_storage()
        shares = [index for index, arg in enumerate(args) if arg.untyped_storage()._cdata == storage._cdata]
        shape = tuple(value.shape), value.stride(), value.storage_offset(), storage.nbytes()
        return shape, value.dtype, value.device, place, shares
    return [described(item, args) for item in value] if isinstance(value, tuple | list) else value


CALLS = {
    "new": lambda x, y: x * y,
    "scalar": lambda x, y: x * 2,
    "transposed": lambda x, y: torch.relu(x.t()),
    "view": lambda x, y: x.view(3, 4)[1:, ::2],
    "several views": lambda x, y: x.split(1),
    "alias": lambda x, y: x.detach(),
    "expanded": lambda x, y: x[:1].expand(5, 6),
    "in place": lambda x, y: x.add_(y),
    "in place on a view": lambda x, y: x[0].mul_(2),
    "several results": lambda x, y: torch.native_layer_norm(x, [6], y[0], y[1], 1e-5),
    "one of several is none": lambda x, y: torch.ops.aten.native_layer_norm_backward(
        x, x, [6], x[:, :1], x[:, :1], y[0], None, [True, True, False]
    ),
    "list": lambda x, y: torch.cat([x, y], dim=1),
    "product": lambda x, y: x @ y.t(),
    "convolution": lambda x, y: torch.conv1d(x[None], y[:, :, None].expand(2, 6, 2)[:, :2], padding=1),
    "channels last": lambda x, y: torch.relu(x.view(1, 2, 3, 2).to(memory_format=torch.channels_last)),
    "other type": lambda x, y: x.to(torch.bfloat16),
    "comparison": lambda x, y: x > y,
    "factory": lambda x, y: torch.empty(2, 3),
    "random": lambda x, y: torch.bernoulli(x, 0.5),
    "foreach": lambda x, y: torch._foreach_mul_([x, y], 2.0),
    "constant": lambda x, y: torch.tensor(3.0),
    "where": lambda x, y: torch.where(x > 0, x, 0.0),
    "max": lambda x, y: x.max(dim=1),
    "unfold": lambda x, y: x.unfold(1, 2, 1),
    "as_strided": lambda x, y: x.as_strided((2, 2), (1, 1), 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_fake_mode(name):
    results = []
    with FakeTensorMode():
        for kernels in (CpuKernels(), CpuKernels(), None):
            args = [torch.empty(2, 6), torch.empty(2, 6)]
            if kernels is None:
                result = CALLS[name](*args)
            else:
                with kernels:
                    result = CALLS[name](*args)
            results.append(described(result, args))
    assert results[0] == results[1] == results[2]


def test_a_known_operation_does_not_run_again(ran):
    with FakeTensorMode(), CpuKernels():
        x = torch.empty(2, 3)
        first = x + 1
        del ran[:]
        second = x + 1
        assert ran == []
        assert first is not second
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_equal_numbers_of_other_types_are_other_arguments():
    with FakeTensorMode(), CpuKernels():
        x = torch.empty(3, dtype=torch.int64)
        dtypes = [(x * value).dtype for value in (1, 1.0, True, 1, 1.0)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32]


def test_the_default_type_is_an_argument():
    dtypes = []
    with FakeTensorMode(), CpuKernels():
        x = torch.empty(3, dtype=torch.int64)
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            try:
                dtypes.append((x / 2).dtype)
            finally:
                torch.set_default_dtype(torch.float32)
    assert dtypes == [torch.float32, torch.float64, torch.float32]


def test_operations_that_change_a_shape_run_each_time(ran):
    with FakeTensorMode(), CpuKernels():
        for _ in range(2):
            x, target = torch.empty(2, 3), torch.empty(0)
            x.transpose_(0, 1)
            torch.add(x, 1, out=target)
            assert (tuple(x.shape), tuple(target.shape)) == ((3, 2), (3, 2))
            x.resize_(7)
            assert x.shape == (7,)
    assert ran.count("aten.transpose_.default") == ran.count("aten.resize_.default") == ran.count("aten.add.out") == 2


def test_a_full_cache_starts_again(monkeypatch, ran):
    monkeypatch.setattr(_shape_cache, "_MOST_ENTRIES", 2)
    with FakeTensorMode(), CpuKernels():
        x = torch.empty(2, 3)
        for _ in range(3):
            shapes = [tuple(y.shape) for y in (x + 1, x.t(), x.sum(), x.view(6))]
            assert shapes == [(2, 3), (3, 2), (), (6,)]
    assert ran.count("aten.sum.default") == 3


class Twice(nn.Embedding):
    """Adds two sparse gradients."""

    def forward(self, x):
        return super().forward(x) + super().forward(x)


def test_results_without_a_storage_run_each_time():
    model, tokens = Twice(50, 16, sparse=True), torch.tensor([[1, 2, 4, 5], [4, 3, 2, 9]])
    measured = measure(model, tokens).peak_bytes
    assert [predict(model, tokens).peak_bytes for _ in range(2)] == [measured, measured]


def test_errors_are_not_remembered():
    with FakeTensorMode(), CpuKernels():
        x, y = torch.empty(2, 3), torch.empty(4)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broadcast"):
                x + y


def test_tensors_of_another_mode_are_refused_each_time():
    with FakeTensorMode():
        other = torch.empty(2)
    with FakeTensorMode(), CpuKernels():
        assert (torch.empty(2) + 1).shape == (2,)
        for _ in range(2):
            with pytest.raises(AssertionError, match="fake mode"):
                other + 1
