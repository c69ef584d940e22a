"""Hooks of modules, tensors and parameters see the same values as on the stored twin, at the right time."""

import copy

import pytest
import torch

from revnet import Reverse, Store
from tests.helpers import (
    CASE,
    DEPTH,
    all_cases,
    all_policies,
    assert_close,
    assert_trains_as_twin,
    gradients,
    squares,
)


@all_policies
@all_cases
def test_parameter_and_tensor_hooks_see_each_gradient_once(case, policy):
    """Hooks of the input, the output and all parameters, before and after accumulation."""

    def step(module, x, args, kwargs):
        seen = {}

        def record(name):
            return lambda grad: seen.setdefault(name, []).append(grad.clone())

        x.register_hook(record("x"))
        for name, parameter in module.named_parameters():
            parameter.register_hook(record(name))
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name: seen.setdefault(f"{name}.grad", []).append(parameter.grad.clone())
            )
        y = module(x, *args, **kwargs)
        y.register_hook(record("y"))
        y.retain_grad()
        squares(y).backward()
        names = sorted(seen)
        assert names == sorted(["x", "y", *[n + end for n, _ in module.named_parameters() for end in ("", ".grad")]])
        assert all(len(gradients) == 1 for gradients in seen.values())
        return [seen[name] for name in names], y.grad

    assert_trains_as_twin(case.sequence(DEPTH, policy), case, step)


@all_cases
def test_hooks_can_change_gradients(case):
    def step(module, x, args, kwargs):
        for parameter in module[0].parameters():
            parameter.register_hook(lambda grad: grad * 3)
        y = module(x, *args, **kwargs)
        y.register_hook(lambda grad: grad.sin())
        squares(y).backward()

    assert_trains_as_twin(case.sequence(3), case, step)


@pytest.mark.parametrize("place", ["f", "within f", "sequence"])
def test_backward_hooks_of_modules(place):
    """Each hook runs once, sees the twin's gradients, and may replace them."""
    calls = []

    def step(module, x, args, kwargs):
        target = {"f": module[1].f, "within f": module[1].f.conv1, "sequence": module}[place]
        seen = []

        def replace(_, grad_inputs, grad_outputs):
            seen.append([grad.clone() for grad in (*grad_inputs, *grad_outputs)])
            return tuple(2 * grad for grad in grad_inputs)

        def replace_before(_, grad_outputs):
            seen.append([grad.clone() for grad in grad_outputs])
            return tuple(grad.sin() for grad in grad_outputs)

        target.register_full_backward_hook(replace)
        target.register_full_backward_pre_hook(replace_before)
        squares(module(x)).backward()
        calls.append(len(seen))
        return seen

    assert_trains_as_twin(CASE["conv"].sequence(3), CASE["conv"], step)
    assert calls == [2, 2]


def test_forward_hooks_run_again_in_a_replay():
    """PyTorch's checkpoint does the same. Hooks of the sequence run once, because the sequence is not replayed.

    Hooks after the first function do not run again, since its replay stops before the last product.
    """
    case = CASE["mlp"]
    sequence = case.sequence(2)
    seen = []
    for name in ("blocks.0.f", "blocks.1.g", ""):
        module = sequence.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(("before", name)))
        module.register_forward_hook(lambda *_, name=name: seen.append(("after", name)))
    loss = squares(sequence(case.input()))
    forward = [("before", ""), ("before", "blocks.0.f"), ("after", "blocks.0.f")]
    assert seen == [*forward, ("before", "blocks.1.g"), ("after", "blocks.1.g"), ("after", "")]
    seen.clear()
    loss.backward()
    assert seen == [
        ("before", "blocks.1.g"),
        ("after", "blocks.1.g"),
        ("before", "blocks.0.f"),
    ]


def test_forward_hooks_can_change_inputs_and_outputs_of_a_function():
    def step(module, x, args, kwargs):
        module[0].f.register_forward_pre_hook(lambda _, inputs: (inputs[0].sin(), *inputs[1:]))
        module[1].g.register_forward_hook(lambda _, __, output: output.tanh())
        module.register_forward_hook(lambda _, __, output: output * 2)
        squares(module(x)).backward()

    assert_trains_as_twin(CASE["conv"].sequence(3), CASE["conv"], step)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_gradients_arrive_block_by_block(name):
    """A function's parameters have their gradients before the previous function is replayed.

    So data parallelism can send buckets, and optimizers can step, during the backward pass.
    """
    case = CASE[name]
    sequence = case.sequence(DEPTH)
    events = []
    functions = [f"blocks.{index}.{function}" for index in range(DEPTH) for function in "fg"]
    for function in functions:
        module = sequence.get_submodule(function)
        module.register_forward_pre_hook(lambda *_, name=function: events.append(("recomputed", name)))
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=function: events.append(("gradient", name)))
    loss = squares(sequence(case.input()))
    events.clear()
    loss.backward()
    expected = []
    for function in reversed(functions):
        num_parameters = len(list(sequence.get_submodule(function).parameters()))
        expected += [("recomputed", function), *[("gradient", function)] * num_parameters]
    assert events == expected


@pytest.mark.parametrize("name", ["mlp", "conv", "conv-dropout", "attention", "tied"])
def test_optimizer_steps_within_the_backward_pass(name):
    """Parameters change as soon as their gradients are ready, which must not affect the functions below."""

    def step(module, x, args, kwargs):
        @torch.no_grad()
        def update(parameter):
            parameter.sub_(parameter.grad, alpha=1e-2)
            parameter.grad = None

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        squares(module(x, *args, **kwargs)).backward()
        return [parameter.detach() for parameter in module.parameters()]

    assert_trains_as_twin(CASE[name].sequence(DEPTH), CASE[name], step)


def test_removed_hooks_do_not_run():
    case = CASE["mlp"]
    sequence = case.sequence(2)
    seen = []
    handle = sequence[0].f.register_forward_hook(lambda *_: seen.append(1))
    loss = squares(sequence(case.input()))
    handle.remove()
    loss.backward()
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PyTorch does not look into the pair.
@pytest.mark.parametrize("policy", [Reverse(), Store()], ids=["reverse", "store"])
def test_block_hooks_run_once_and_see_the_streams(policy):
    sequence = CASE["mlp"].sequence(3, policy)
    plain = copy.deepcopy(sequence)
    x = CASE["mlp"].input()
    plain_x = x.detach().clone().requires_grad_()
    seen = []
    block = sequence[1]
    block.register_forward_pre_hook(lambda _, inputs: seen.append(("in", *inputs[0])))
    block.register_forward_hook(lambda _, __, output: seen.append(("out", *output)))
    block.register_full_backward_pre_hook(lambda _, grads: seen.append(("backward", *grads)))
    y = sequence(x)
    y.square().sum().backward()
    plain(plain_x).square().sum().backward()
    assert [name for name, *_ in seen] == ["in", "out", "backward"]
    assert all(tensor.shape == (4, 3) for _, *tensors in seen for tensor in tensors)
    assert_close(torch.cat(seen[1][1:], -1), sequence[1](sequence[0](x)))
    assert_close(x.grad, plain_x.grad)
    assert_close(gradients(sequence), gradients(plain))


@pytest.mark.parametrize("policy", [Reverse(), Store()], ids=["reverse", "store"])
@pytest.mark.parametrize("what", ["input", "output"])
def test_block_hook_that_replaces_a_stream_raises(what, policy):
    sequence = CASE["mlp"].sequence(3, policy)
    if what == "input":
        sequence[1].register_forward_pre_hook(lambda _, inputs: ((inputs[0][0] + 1, inputs[0][1]), *inputs[1:]))
    else:
        sequence[1].register_forward_hook(lambda _, __, output: (output[0], 2 * output[1]))
    with pytest.raises(RuntimeError, match=rf"overridden `forward` of the block of `blocks\.1\.f` replaced its {what}"):
        sequence(CASE["mlp"].input())
    sequence[1]._forward_pre_hooks.clear()
    sequence[1]._forward_hooks.clear()
    sequence(CASE["mlp"].input()).sum().backward()


def test_blocks_with_hooks_pass_arguments_on():
    case = CASE["attention-context-mask"]
    sequence = case.sequence(3)
    for block in sequence:
        block.register_forward_hook(lambda *_: None)

    def step(module, x, args, kwargs):
        squares(module(x, *args, **kwargs)).backward()

    assert_trains_as_twin(sequence, case, step)


def test_global_hooks_see_the_blocks():
    sequence = CASE["mlp"].sequence(2)
    seen = []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
        sequence(CASE["mlp"].input())
    assert seen.count("ReversibleBlock") == 2
