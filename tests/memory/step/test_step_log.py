"""Log of a step."""

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from revnet import ReversibleSequential, Store
from revnet.memory.step._flops import FlopCounter
from revnet.memory.step._run_step import run_step
from tests.helpers import CASE, mlp


def log_of(model, *args):
    return run_step(model, args, {}, loss=None, autocast=None).log


def test_calls_are_in_order_and_nested():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    log = log_of(model, torch.randn(5, 3))
    assert [call.name for call in log.calls] == ["", "0", "1", "1.0", "1.1"]
    assert log.calls[3].module is model[1][0]
    model_call, first, second, tanh, last = log.calls
    assert model_call.start_event == first.start_event == 0
    assert first.stop_event == second.start_event == tanh.start_event
    assert tanh.stop_event == last.start_event
    assert last.stop_event == second.stop_event == model_call.stop_event < log.forward_end
    assert first.start_sequence < first.stop_sequence == second.start_sequence < second.stop_sequence


def test_the_backward_pass_belongs_to_the_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    log = log_of(model, torch.randn(5, 3))
    owners = [log.modules[owner] if owner >= 0 else "loss" for owner in log.owners[log.forward_end :]]
    order = [name for index, name in enumerate(owners) if index == 0 or owners[index - 1] != name]
    assert order == ["loss", "2", "1", "0"]
    for call in log.calls[1:]:
        forward = slice(call.start_event, call.stop_event)
        in_backward = (log.sequence >= call.start_sequence) & (log.sequence < call.stop_sequence)
        in_backward[: log.forward_end] = False
        assert log.flops[in_backward].sum() == (1 if call.name == "0" else 2) * log.flops[forward].sum()


def test_recomputation_belongs_to_the_reversed_block():
    """It does not appear as a call in the forward pass."""
    sequence = ReversibleSequential(*CASE["mlp"].sequence(3)).float()
    stored = ReversibleSequential(*sequence, policy=Store())
    x = torch.randn(4, 6, requires_grad=True)
    log, stored_log = log_of(sequence, x), log_of(stored, x)
    names = [call.name for call in log.calls if call.name.count(".") == 2]
    assert names == [f"blocks.{index}.{name}" for index in range(3) for name in "fg"]
    assert [call.name for call in log.calls] == [call.name for call in stored_log.calls]
    function_flops = 2 * 2 * 4 * 3 * 3
    again, plain = backward_flops(log, names), backward_flops(stored_log, names)
    assert plain == [2 * function_flops] * 6
    assert again[1:] == [3 * function_flops] * 5
    assert again[0] >= 2.5 * function_flops, (
        "no function before the first one reads a stream, so its replay may skip the last layer"
    )


def backward_flops(log, names):
    """Return the floating-point operations of each function in the backward pass."""
    flops = []
    for call in (call for call in log.calls if call.name in names):
        own = (log.sequence >= call.start_sequence) & (log.sequence < call.stop_sequence)
        flops.append(log.flops[log.forward_end :][own[log.forward_end :]].sum())
    return flops


def test_nodes_created_in_the_backward_pass():
    """A reentrant checkpoint runs its own backward pass within its node."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (mlp(4) for _ in range(3))

        def forward(self, x):
            return self.c(checkpoint(self.b, self.a(x), use_reentrant=True))

    log = log_of(Model(), torch.randn(2, 4, requires_grad=True))
    assert [call.name for call in log.calls if "." not in call.name] == ["", "a", "b", "c"]
    assert log.sequence[log.forward_end :].max() == log.sequence[log.forward_end]
    assert log.flops.sum() == (3 + 1 + 6) * 2 * 2 * 2 * 4 * 4


def test_flops_equal_the_counter():
    case = CASE["conv"]
    sequence, x = case.sequence(2), case.input()
    with FlopCounter() as counter:
        log = log_of(sequence, x)
    assert log.flops.sum() == counter.flops
    model, x = nn.Linear(3, 4, bias=False), torch.randn(5, 3)
    log = log_of(model, x)
    product = int(np.flatnonzero(log.flops)[0])
    assert log.flops[product] == 2 * 5 * 3 * 4
    assert log.moved_bytes[product] == 4 * (5 * 3 + 3 * 4 + 5 * 4)
    assert log.moved_bytes[0] == 0, "the weight transposed is a view"


def test_live_storages():
    log = log_of(mlp(8), torch.randn(4, 8))
    for event in range(log.num_events):
        assert log.sizes[log.live(event)].sum() == log.live_bytes[event]
    assert log.held_bytes == log.sizes[log.is_held].sum() == log.live_bytes[log.forward_end]


def test_a_gradient_counts_once_it_is_in_grad():
    model = nn.Linear(3, 4)
    log = log_of(model, torch.randn(5, 3))
    since = np.sort(log.gradient_since[log.gradient_since < log.num_events])
    assert len(since) == 2
    assert log.gradient_bytes[since[0] - 1] == 0
    assert log.gradient_bytes[-1] == 4 * (3 * 4 + 4)


def test_copied_gradients_count_once():
    """If two parameters get the same gradient, autograd copies it for one of them or for both."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))

        def forward(self):
            return (self.a + self.b).exp()

    log = log_of(Sum())
    assert log.gradient_bytes[-1] == 2 * 40
    assert log.activation_bytes.max() == 40 + 40 + 4 + 4  # the exponential and its gradient; the loss and its gradient


def test_calls_end_at_an_exception_that_the_model_catches():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x)

    log = log_of(Careful(), torch.randn(2, 4))
    assert [call.name for call in log.calls] == ["", "wrong", "right"]
    assert log.calls[0].stop_event == log.calls[2].stop_event
