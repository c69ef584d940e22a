"""Under PyTorch's transforms, the result is right, or there is an error before any wrong number."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from tests.helpers import (
    CASE,
    all_cases,
    assert_close,
    assert_trains_as_twin,
    gradients,
    right_or_raises,
    squares,
    stored_twin,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # PyTorch's forward mode uses it.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # Raised by vmap of fused attention.
]


@pytest.mark.parametrize("name", ["conv", "mlp", "attention", "split-batch", "tied", "transposed", "complex"])
def test_vmap(name):
    def step(module, x, args, kwargs):
        return torch.func.vmap(module.eval())(torch.stack((x, -x)).detach())

    assert_trains_as_twin(CASE[name].sequence(2), CASE[name], step)


@pytest.mark.parametrize("policy", ["reverse", "checkpoint", "offload"])
@pytest.mark.parametrize("name", ["mlp", "attention", "tied"])
def test_gradient_of_a_vmapped_sequence(name, policy):
    """Saved tensors are batched inside of `vmap`, and no longer exist outside of it, so all of them are stored."""
    sequence = CASE[name].sequence(2)
    set_policy(sequence, policy)

    def step(module, x, args, kwargs):
        squares(torch.func.vmap(module)(torch.stack((x, -x)))).backward()

    assert_trains_as_twin(sequence, CASE[name], step)


@pytest.mark.parametrize("policy", ["reverse", "checkpoint"])
def test_ensemble_of_sequences(policy):
    models = [CASE["mlp"].sequence(2) for _ in range(2)]
    for model in models:
        set_policy(model, policy)
    parameters, buffers = torch.func.stack_module_state(models)
    x = CASE["mlp"].input()

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    squares(torch.func.vmap(call)(parameters, buffers)).backward()
    for index, model in enumerate(models):
        squares(model(x)).backward()
        for name, parameter in model.named_parameters():
            assert_close(parameters[name].grad[index], parameter.grad)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: squares(f(x)))(x),
        lambda f, x: torch.func.vjp(f, x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.func.vmap(torch.func.grad(lambda x: squares(f(x[None]))))(x),
    ],
    ids=["grad", "vjp", "jacrev", "hessian", "per-sample"],
)
def test_reverse_mode_of_torch_func_raises(transform):
    """PyTorch forbids saved-tensor hooks there, and the error names the alternatives."""
    sequence = CASE["mlp"].sequence(2)
    x = CASE["mlp"].input(requires_grad=False)
    with pytest.raises(RuntimeError, match="forbid the saved-tensor hooks that rebuild"):
        transform(sequence, x)
    loss = squares(sequence(x))  # The error has no lasting effect.
    loss.backward()


def test_saved_tensor_hooks_that_the_user_disables_raise_with_the_reason():
    sequence, x = CASE["mlp"].sequence(2), CASE["mlp"].input()
    with (
        torch.autograd.graph.disable_saved_tensors_hooks("not in this part"),
        pytest.raises(RuntimeError, match=r"are disabled \(not in this part\); call it outside of `torch.autograd.gra"),
    ):
        sequence(x)
    squares(sequence(x)).backward()


class Energy(nn.Module):
    """A residual that is the gradient of an energy."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 3), how

    def forward(self, x):
        def energy(x):
            return self.linear(x).tanh().square().sum()

        if self.how == "func":
            return torch.func.grad(energy)(x)
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            return torch.autograd.grad(energy(x), x, create_graph=True)[0]


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), Reverse(hold=True)], ids=str)
def test_torch_func_inside_a_function_raises_and_torch_autograd_does_not(policy):
    blocks = [ReversibleBlock(Energy("func"), Energy("func")) for _ in range(2)]
    sequence, x = ReversibleSequential(*blocks, policy=policy), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match=r"a residual function .* uses `torch.func.grad`, .* use `torch.autograd"):
        sequence(x)
    gradients = []
    for how, chosen in (("autograd", policy), ("func", Store())):
        set_policy(sequence, chosen)
        for function in (function for block in blocks for function in (block.f, block.g)):
            function.how = how
        gradients.append(torch.autograd.grad(squares(sequence(x)), list(sequence.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["conv", "mlp", "split-batch", "tied", "transposed"])
def test_forward_mode_of_torch_func(name):
    def step(module, x, args, kwargs):
        x = x.detach()
        y, tangent = torch.func.jvp(module.eval(), (x,), (torch.ones_like(x),))
        return y, tangent, torch.func.jacfwd(lambda x: squares(module(x)))(x)

    assert_trains_as_twin(CASE[name].sequence(2), CASE[name], step)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("name", ["conv", "mlp", "spectral-norm", "averaging", "random", "complex"])
def test_forward_mode(name, no_grad):
    def step(module, x, args, kwargs):
        x = x.detach()
        with forward_ad.dual_level(), torch.set_grad_enabled(not no_grad):
            y = forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x))))
            return y.primal, y.tangent

    assert_trains_as_twin(CASE[name].sequence(3), CASE[name], step)


def test_forward_mode_of_parameters_over_reverse_mode():
    """This is a Hessian-vector product."""

    def step(module, x, args, kwargs):
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p, torch.ones_like(p)) for n, p in module.named_parameters()}
            loss = squares(torch.func.functional_call(module, duals, (x,)))
            grads = torch.autograd.grad(loss, list(duals.values()))
            return [tuple(forward_ad.unpack_dual(grad)) for grad in grads]

    assert_trains_as_twin(CASE["mlp"].sequence(3), CASE["mlp"], step)


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("of", ["primal", "tangent"])
def test_reverse_mode_over_forward_mode_is_right_or_raises(batch, inside, of):
    """The graph of a tangent cannot be rebuilt. With a batch of 3, all saved tensors have the same shape."""
    sequence = CASE["mlp"].sequence(2)
    twin = stored_twin(sequence)
    x = torch.randn(batch, 6, dtype=torch.float64)

    def gradient(module):
        start = x.clone().requires_grad_()
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(module(forward_ad.make_dual(start, torch.ones_like(x))))
            loss = squares(y.primal if of == "primal" else y.tangent)
            if inside:
                return torch.autograd.grad(loss, [start, *module.parameters()], allow_unused=True)
        return torch.autograd.grad(loss, [start, *module.parameters()], allow_unused=True)

    expected = gradient(twin)
    with right_or_raises("did something else when it ran again"):
        assert_close(gradient(sequence), expected)


def test_batched_gradients():
    """With `is_grads_batched`, the backward pass runs under `vmap`, and so does the replay."""

    def step(module, x, args, kwargs):
        directions = torch.randn(3, *x.shape, dtype=x.dtype)
        wanted = [x, *module.parameters()]
        return torch.autograd.grad(module(x, *args, **kwargs), wanted, directions, is_grads_batched=True)

    for name in ("mlp", "tied", "averaging", "nested-arguments"):
        assert_trains_as_twin(CASE[name].sequence(3), CASE[name], step)


@all_cases
def test_parameters_swapped_by_functional_call(case):
    """The parameters of the forward pass are not the ones in the module during the backward pass."""

    def step(module, x, args, kwargs):
        swapped = {n: (p.detach() * 1.5).requires_grad_() for n, p in module.named_parameters()}
        y = torch.func.functional_call(module, swapped, (x, *args), kwargs)
        squares(y).backward()
        return [parameter.grad for parameter in swapped.values()]

    assert_trains_as_twin(case.sequence(3), case, step)


def test_buffers_swapped_by_functional_call():
    case = CASE["averaging"]

    def step(module, x, args, kwargs):
        swapped = {n: b + 1 for n, b in module.named_buffers()}
        squares(torch.func.functional_call(module, swapped, (x,))).backward()

    assert_trains_as_twin(case.sequence(3), case, step)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo reads it for every input.
@pytest.mark.parametrize("name", ["conv", "attention"])
def test_compiled_residual_functions(name):
    """AOTAutograd runs its own graph, without a compiler."""
    case = CASE[name]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    x = case.input()
    twin_x = x.detach().clone().requires_grad_()
    for block in sequence:
        block.f.compile(backend="aot_eager")
        block.g.compile(backend="aot_eager")
    for module, start in ((sequence, x), (twin, twin_x)):
        module(start).square().sum().backward()
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert_close(buffer, expected)


def test_tensor_subclasses_pass_through():
    class Tagged(torch.Tensor):
        pass

    sequence = ReversibleSequential(*[ReversibleBlock(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    x = CASE["mlp"].input(requires_grad=False)
    for module in (sequence, twin):
        y = module(x.as_subclass(Tagged))
        assert type(y) is Tagged
        squares(y).backward()
    assert_close(gradients(sequence), gradients(twin))
