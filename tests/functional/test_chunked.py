import copy
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.errors import ReconstructionError
from revnet.functional._chunked import chunked
from revnet.memory import measure
from tests.helpers import assert_close, gradients


def perceptron(frozen=False):
    layers = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    layers[1].weight.requires_grad_(not frozen)
    return layers


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_the_module(num_chunks, frozen):
    module, x = perceptron(frozen), torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (lambda x: chunked(module, x, num_chunks), module):
        module.zero_grad()
        y = function(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        y.square().sum().backward(inputs=[parameter for parameter in module.parameters() if parameter.requires_grad])
        results.append((y, grad, gradients(module)))
    assert_close(results[0], results[1], tolerance=1e-12)
    with torch.no_grad():
        assert_close(chunked(module, x, num_chunks), module(x), tolerance=1e-12)


def test_input_without_gradient():
    module, x = perceptron(), torch.randn(2, 7, 4, dtype=torch.float64)
    chunked(module, x, 3).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_double_backward():
    module, x = perceptron(), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: chunked(module, x, 2), (x,))
    assert torch.autograd.gradgradcheck(lambda x: chunked(module, x, 2), (x,))


def test_backward_uses_the_autocast_of_the_forward_pass():
    module, x = perceptron().float(), torch.randn(2, 6, 4, requires_grad=True)
    results = []
    for function in (lambda x: chunked(module, x, 2), module):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, module[3].weight))))
    assert results[0][0].dtype == torch.bfloat16
    # The gradient of a weight is a sum of two chunks, each rounded to bfloat16's 8 bits: three roundings of 2^-9, of
    # numbers that may be larger than their sum.
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 2**-4 * expected.abs().max()


class Quadratic(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x):
        return x * self.weight**2


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 256), (torch.float16, 2048)])
@pytest.mark.parametrize("how", ["backward", "twice", "batched", "torch.func", "compile"])
def test_gradients_of_low_precision_are_summed_in_float32(dtype, largest, how):
    """In these types, `largest + 1` is `largest`."""
    x = torch.tensor([1, largest, 1], dtype=dtype)
    expected = torch.tensor([2.0 * (largest + 2)], dtype=dtype)
    model = InChunks(Quadratic(dtype))
    weight = model.module.weight
    if how == "torch.func":
        grads = torch.func.grad(lambda weights: functional_call(model, weights, x).sum())
        assert torch.equal(grads({"module.weight": weight.detach()})["module.weight"], expected)
        return
    function = torch.compile(model, backend="eager", fullgraph=True) if how == "compile" else model
    y = function(x)
    if how == "batched":
        vectors = torch.ones(2, 3, dtype=dtype)
        (grad,) = torch.autograd.grad(y, weight, vectors, is_grads_batched=True)
        assert torch.equal(grad, expected.expand(2, 1))
        return
    (grad,) = torch.autograd.grad(y.sum(), weight, create_graph=how == "twice")
    assert torch.equal(grad, expected)
    if how == "twice":
        assert torch.equal(*torch.autograd.grad(grad, weight), expected)


def test_sparse_gradients_of_low_precision():
    embedding = nn.Embedding(3, 2, sparse=True).bfloat16()
    chunked(embedding, torch.tensor([1, 1, 0, 1]), 3, dim=0).sum().backward()
    assert_close(embedding.weight.grad.to_dense(), torch.tensor([[1, 1], [3, 3], [0, 0]]).bfloat16(), tolerance=0)


class WithoutGraph(nn.Module):
    """Computes an output that depends on nothing for autograd, if the input is positive or always."""

    def __init__(self, is_always):
        super().__init__()
        self.layer, self.is_always = nn.Linear(4, 4).double(), is_always

    def forward(self, x):
        y = self.layer(x)
        return y.detach() if self.is_always or bool(x.detach().sum() > 0) else y


@pytest.mark.parametrize("is_always", [True, False])
@pytest.mark.parametrize("create_graph", [True, False])
def test_outputs_without_a_graph(is_always, create_graph):
    module = WithoutGraph(is_always)
    x = torch.tensor([1.0, -1, -1], dtype=torch.float64)[:, None].expand(3, 4).clone().requires_grad_()
    y = chunked(module, x, 3, dim=0)
    assert y.requires_grad is not is_always
    (grad,) = torch.autograd.grad((x + y).sum(), x, create_graph=create_graph)
    expected = torch.autograd.grad((x + torch.cat([module(part) for part in x.split(1)])).sum(), x)[0]
    assert_close(grad, expected, tolerance=1e-12)
    model = ReversibleSequential(ReversibleBlock(InChunks(module), nn.Identity()), policy=Reverse(keep="linear"))
    model(torch.ones(3, 8, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert module.layer.weight.grad is None


class Whole(nn.Module):
    def __init__(self, num_chunks):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 1024), nn.GELU(), nn.Linear(1024, 4))
        self.num_chunks = num_chunks

    def forward(self, x):
        return chunked(self.layers, x, self.num_chunks)


def test_stores_one_chunk_at_a_time():
    x = torch.randn(1, 512, 4)
    hidden = 512 * 1024 * 4
    held = [measure(Whole(num_chunks), x).held_bytes for num_chunks in (1, 8)]
    assert held[0] - held[1] == 2 * hidden  # before and after GELU; the input is stored in any case
    peaks = [measure(Whole(num_chunks), x).activation_bytes for num_chunks in (1, 8)]
    assert peaks[0] >= 3 * hidden  # and the gradient
    assert peaks[1] <= 3 * hidden / 8 + 6 * 4 * 1024 * 4  # plus gradients of both weights, their sums and new sums


class WithSpare(nn.Module):
    """Has a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.tanh(self.used(x))


def test_an_unused_parameter_gets_no_gradient():
    module, x = WithSpare().double(), torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    chunked(module, x, 3).sum().backward()
    assert module.spare.grad is None
    chunked_gradients = x.grad.clone(), module.used.weight.grad.clone()
    x.grad = module.used.weight.grad = None
    module(x).sum().backward()
    assert_close((x.grad, module.used.weight.grad), chunked_gradients, tolerance=1e-12)


class Scaled(nn.Module):
    """Multiplies a hidden layer by a buffer, and the result by a tensor that is not registered."""

    def __init__(self, scale=None):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4).double(), scale
        self.register_buffer("gain", torch.full((4,), 2.0, dtype=torch.float64))
        self.dropout = nn.Dropout()

    def forward(self, x):
        y = torch.tanh(self.layer(x) * self.gain)
        if not self.training:
            y = self.dropout(y) * 3
        return y if self.scale is None else y * self.scale


class InChunks(nn.Module):
    def __init__(self, module, num_chunks=3, dim=0):
        super().__init__()
        self.module, self.num_chunks, self.dim = module, num_chunks, dim

    def forward(self, x):
        return chunked(self.module, x, self.num_chunks, dim=self.dim)


def rows(requires_grad=True):
    return torch.randn(6, 4, dtype=torch.float64, requires_grad=requires_grad)


def replace_the_buffer(model):
    model.gain = 5 * model.gain


CHANGES = {
    "train": nn.Module.train,
    "eval": nn.Module.eval,
    "buffer": replace_the_buffer,
    "freeze": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_between_the_passes_do_not_matter(change, is_training):
    module = Scaled().train(is_training)
    results, x = [], rows()
    for num_chunks in (3, 1):
        model = copy.deepcopy(module)
        weight = model.layer.weight
        y = chunked(model, x, num_chunks, dim=0)
        change(model)
        flags = [part.training for part in model.modules()]
        trained = [tensor for tensor in (x, weight) if tensor.requires_grad]
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
        assert [part.training for part in model.modules()] == flags
    assert_close(*results, tolerance=1e-12)


@pytest.mark.parametrize("name", ["gain", "layer.weight"])
def test_a_write_between_the_passes_raises(name):
    module = Scaled()
    y = chunked(module, rows(), 3, dim=0)
    with torch.no_grad():
        (module.gain if name == "gain" else module.layer.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_submodule_that_was_replaced_raises():
    module = Scaled()
    y = chunked(module, rows(), 3, dim=0)
    module.layer = nn.Linear(4, 4).double()
    with pytest.raises(
        ReconstructionError, match=r"`module` \(=Scaled\) has other submodules than in the forward pass"
    ):
        y.sum().backward()


@pytest.mark.parametrize("policy", [None, Store(), Reverse(), Checkpoint(), Reverse(keep="linear")])
def test_functional_call_with_other_buffers(policy):
    """The backward pass runs outside of the call."""
    results, x = [], rows() if policy is None else torch.randn(6, 8, dtype=torch.float64)
    first = [Scaled().train() for _ in range(4)]
    for num_chunks in (3, 1):
        parts = [InChunks(copy.deepcopy(part), num_chunks) for part in first]
        blocks = [ReversibleBlock(*parts[:2], split_dim=-1), ReversibleBlock(*parts[2:], split_dim=-1)]
        model = parts[0] if policy is None else ReversibleSequential(*blocks, policy=policy)
        parameters = {name: tensor.detach().requires_grad_() for name, tensor in model.named_parameters()}
        others = {name: torch.full_like(buffer, 3) for name, buffer in model.named_buffers()}
        y = functional_call(model, (parameters, others), (x,))
        results.append((y, *torch.autograd.grad(y.square().sum(), [*parameters.values()])))
    assert_close(*results, tolerance=1e-10)  # Rebuilt activations are rounded.


def test_parameters_that_depend_on_one_another():
    """The gradient of the first parameter must not include the way through the second one."""
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), rows()
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for num_chunks in (3, 1):
        y = functional_call(InChunks(module, num_chunks), {"module.0.weight": weight, "module.2.weight": 2 * weight}, x)
        (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), (weight, x))))
    assert_close(*results, tolerance=1e-12)


@pytest.mark.parametrize("is_read_before", [False, True])
def test_parametrizations_in_a_cache(is_read_before):
    module, x = Scaled(), rows()
    nn.utils.parametrizations.weight_norm(module.layer)
    results = []
    for num_chunks in (3, 1):
        module.zero_grad()
        with nn.utils.parametrize.cached():
            before = module.layer.weight.sum() if is_read_before else 0
            (
                chunked(module, x, num_chunks, dim=0).square().sum() + before + module.layer.weight.square().sum()
            ).backward()
        results.append(gradients(module))
    assert_close(*results, tolerance=1e-12)


@pytest.mark.parametrize("is_leaf", [True, False])
def test_a_tensor_from_outside_raises(is_leaf):
    scale = torch.randn(4, dtype=torch.float64, requires_grad=True)
    module = Scaled(scale if is_leaf else 2 * scale)
    message = r"`module` \(=Scaled\) uses a tensor of shape \(4,\) that requires a gradient.* or use `num_chunks=1`"
    with pytest.raises(NotImplementedError, match=message):
        chunked(module, rows(), 3, dim=0)
    halves = torch.randn(6, 8, dtype=torch.float64)
    for policy in (Store(), Reverse(), Checkpoint(), Reverse(keep="linear")):
        parts = InChunks(module), InChunks(copy.copy(module))
        model = ReversibleSequential(ReversibleBlock(*parts, split_dim=-1), policy=policy)
        with pytest.raises(NotImplementedError, match=message):
            model(halves).sum().backward()


def test_a_tensor_from_outside_of_a_frozen_module():
    """Without other gradients, the chunks use ordinary autograd."""
    scale = torch.randn(4, dtype=torch.float64, requires_grad=True)
    module, x = Scaled(2 * scale).requires_grad_(False), rows(requires_grad=False)
    grads = [
        torch.autograd.grad(chunked(module, x, num_chunks, dim=0).square().sum(), scale, retain_graph=True)
        for num_chunks in (3, 1)
    ]
    assert_close(*grads, tolerance=1e-12)


def test_a_tensor_from_outside_that_appears_between_the_passes_raises():
    module = Scaled()
    y = chunked(module, rows(), 3, dim=0)
    module.scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="uses a tensor of shape"):
        y.sum().backward()


class Writes(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(4, 4).double(), what
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.what == "buffer":
            self.count += 1
        elif self.what == "new buffer":
            self.count = self.count + 1
        else:
            x.mul_(2)
        return self.layer(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("buffer", "writes to its tensor `count`"),
        ("new buffer", "replaces its tensor `count`"),
        ("input", "writes to its input"),
    ],
)
def test_a_module_with_a_state_raises(what, message):
    with pytest.raises(NotImplementedError, match=rf"`module` \(=Writes\) {message}, which `chunked` would repeat"):
        chunked(Writes(what), rows(requires_grad=False), 3, dim=0)


class WithSideOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x):
        y = self.layer(x)
        self.penalty = self.layer.weight.square().sum()
        return y


def test_a_side_output_has_the_gradients_of_the_forward_pass():
    module = WithSideOutput()
    (chunked(module, rows(), 3, dim=0).sum() * 0 + module.penalty).backward()
    assert_close(module.layer.weight.grad, 2 * module.layer.weight, tolerance=1e-12)
    with pytest.raises(ReconstructionError, match="computed in the backward pass of `chunked` and kept"):
        module.penalty.backward()


class Awkward(nn.Module):
    """Shares a parameter and a module, and has an LSTM, which keeps a list of its own parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.first
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(self.second(torch.tanh(self.first(x)))[:, None])[0][:, 0] + self.again(x)


@pytest.mark.parametrize("make", [Awkward, lambda: InChunks(perceptron(), 2), nn.Identity])
def test_structures(make):
    module, x = make().double(), rows()
    results = []
    for function in (functools.partial(chunked, module, num_chunks=3, dim=0), module):
        names = [id(tensor) for tensor in module.parameters()]
        inputs = [x, *module.parameters()]
        grads = torch.autograd.grad(function(x).square().sum(), inputs, create_graph=True)
        results.append((*grads, *torch.autograd.grad(grads[0].square().sum(), inputs, allow_unused=True)[:1]))
        function(x).sum().backward()
        assert [id(tensor) for tensor in module.parameters()] == names
    assert_close(*results, tolerance=1e-12)


def test_hooks_of_parameters_run_once():
    module, calls = perceptron(), []
    module[1].weight.register_hook(lambda grad: calls.append(None) or 2 * grad)
    for create_graph in (False, True):
        x = torch.randn(2, 6, 4, dtype=torch.float64)
        (grad,) = torch.autograd.grad(chunked(module, x, 3).sum(), module[1].weight, create_graph=create_graph)
        (expected,) = torch.autograd.grad(module(x).sum(), module[1].weight)
        assert_close(grad, expected, tolerance=1e-12)
    assert len(calls) == 4


# PyTorch's rules for forward mode use a deprecated function.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_transforms_of_functions():
    module, x = perceptron(), torch.randn(2, 6, 4, dtype=torch.float64)
    transforms = [
        lambda function: torch.func.grad(lambda x: function(x).square().sum())(x),
        lambda function: torch.func.vmap(function)(torch.stack([x, 2 * x])),
        lambda function: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
        lambda function: torch.autograd.functional.jacobian(function, x[:1, :2], vectorize=True),
    ]
    for transform in transforms:
        assert_close(transform(lambda x: chunked(module, x, 2)), transform(module), tolerance=1e-12)


def test_keeps_no_graph_of_the_forward_pass():
    module, x = Whole(8), torch.randn(1, 512, 4)
    seen = []
    module.layers[1].register_forward_hook(lambda _module, _args, y: seen.append(y.grad_fn))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        sizes = []
        module(x)
    assert len(seen) == 8
    # The input and the parameters are saved; no hidden layer is.
    assert sorted(sizes) == sorted([x.numel(), *[parameter.numel() for parameter in module.parameters()]])
