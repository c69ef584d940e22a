"""The operators that a step runs again under `Reverse(hold=..., keep=...)`: calls, FLOPs and bytes, all exact."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.bench.cases import Attention, feed_forward
from revnet.memory import measure, predict
from revnet.models.resnet import BasicResidual

NUM_BLOCKS = 3
SHAPES = {"conv": (2, 4, 8, 8), "transformer": (2, 6, 8)}
CONV = 2 * 2 * 8 * 8 * 4 * 4 * 9
"""FLOPs of a convolution."""
LINEAR = 2 * 2 * 6 * 8 * 8
"""FLOPs of a linear layer with equally many inputs and outputs."""
_aten = torch.ops.aten
KINDS = {
    _aten.convolution.default: "convolution",
    _aten._scaled_dot_product_flash_attention_for_cpu.default: "attention",
}


class Log(TorchDispatchMode):
    """Counts calls of forward operators; a linear layer is named by its numbers of inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _aten.addmm.default:
            self.calls["linear {} {}".format(*args[2].shape)] += 1
        elif func in KINDS:
            self.calls[KINDS[func]] += 1
        return func(*args, **(kwargs or {}))


def make_sequence(kind, policy):
    torch.manual_seed(0)
    functions = {
        "conv": lambda: (BasicResidual(4, 4), BasicResidual(4, 4)),
        "transformer": lambda: (Attention(8, num_heads=2), feed_forward(8)),
    }
    blocks = [ReversibleBlock(*functions[kind]()) for _ in range(NUM_BLOCKS)]
    return ReversibleSequential(*blocks, policy=policy)


def streams_of(kind):
    return tuple(torch.randn(SHAPES[kind], requires_grad=True) for _ in range(2))


def backward_calls(kind, policy):
    """Return the calls of forward operators in the backward pass."""
    loss = sum(y.square().sum() for y in make_sequence(kind, policy)(streams_of(kind)))
    with Log() as log:
        loss.backward()
    return log.calls


def step_flops(kind, policy):
    sequence, streams = make_sequence(kind, policy), streams_of(kind)
    with FlopCounterMode(display=False) as counter:
        sum(y.square().sum() for y in sequence(streams)).backward()
    return counter.get_total_flops()


def name_of(value):
    """Return the name of a parameter, without the addresses of objects."""
    return str(value).partition("<")[0]


BOTH = ("f", "g")
# The first function stops early in any case, since no stream below it is rebuilt.
CONV_CALLS = [
    (Reverse(), 4 * NUM_BLOCKS - 1),
    (Reverse(keep="convolution.0"), 2 * NUM_BLOCKS - 1),
    (Reverse(keep="convolution.1"), 2 * NUM_BLOCKS),
    (Reverse(keep="convolution"), 0),
    (Reverse(keep="f.convolution.0"), 3 * NUM_BLOCKS - 1),
    (Reverse(hold="f"), 3 * NUM_BLOCKS - 1),
    (Reverse(hold="g"), 3 * NUM_BLOCKS),
    (Reverse(hold=BOTH), 2 * NUM_BLOCKS),
    (Reverse(hold=BOTH, keep="convolution.0"), 0),
    (Reverse(hold=BOTH, keep=torch.ops.aten.convolution), 0),
    (Reverse(keep="1GiB"), 0),
    (Reverse(keep=lambda context, operator, *args, **kwargs: operator is _aten.convolution.default), 0),
]


@pytest.mark.parametrize(("policy", "num_calls"), CONV_CALLS, ids=name_of)
def test_convolutions_that_run_again(policy, num_calls):
    assert backward_calls("conv", policy) == Counter(convolution=num_calls)
    assert step_flops("conv", policy) == step_flops("conv", Store()) + num_calls * CONV


def transformer_calls(qkv, attention, out, hidden, last):
    """Return calls by the operators that run again, of F and then of G."""
    names = {"linear 8 24": qkv, "attention": attention, "linear 8 8": out, "linear 8 32": hidden, "linear 32 8": last}
    return Counter({name: number for name, number in names.items() if number})


TRANSFORMER_CALLS = [
    (Reverse(), transformer_calls(3, 3, 2, 3, 3)),
    (Reverse(hold="f"), transformer_calls(3, 3, 2, 3, 0)),
    (Reverse(hold="g"), transformer_calls(3, 3, 0, 3, 3)),
    (Reverse(hold=BOTH), transformer_calls(3, 3, 0, 3, 0)),
    (Reverse(keep="attention"), transformer_calls(3, 0, 2, 3, 3)),
    (Reverse(keep=("f.linear.0", "g.linear.1")), transformer_calls(0, 3, 2, 3, 0)),
    (Reverse(hold=BOTH, keep=("attention", "g.linear.0")), transformer_calls(3, 0, 0, 0, 0)),
    (Reverse(keep=("attention", "linear")), transformer_calls(0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("policy", "calls"), TRANSFORMER_CALLS, ids=name_of)
def test_linear_layers_and_attention_that_run_again(policy, calls):
    assert backward_calls("transformer", policy) == calls
    # PyTorch's counter may not know the FLOPs of attention on a CPU.
    function, streams = make_sequence("transformer", Store()).blocks[0].f, streams_of("transformer")
    with FlopCounterMode(display=False) as counter:
        function(streams[0])
    flops = {
        "attention": counter.get_total_flops() - 4 * LINEAR,
        "linear 8 24": 3 * LINEAR,
        "linear 8 8": LINEAR,
        "linear 8 32": 4 * LINEAR,
        "linear 32 8": 4 * LINEAR,
    }
    again = sum(flops[name] * number for name, number in calls.items())
    assert step_flops("transformer", policy) == step_flops("transformer", Store()) + again


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("hold", [(), "f", BOTH])
@pytest.mark.parametrize(("kind", "keep"), [("conv", "convolution.0"), ("transformer", ("attention", "g.linear"))])
def test_predicted_bytes_equal_counted_bytes(kind, keep, hold, autocast):
    sequence, streams = make_sequence(kind, Reverse(hold=hold, keep=keep)), streams_of(kind)
    measure(sequence, streams, autocast=autocast)  # In the first step, autocast may make the engine check a function.
    counted, predicted = (way(sequence, streams, autocast=autocast) for way in (measure, predict))
    assert predicted == counted
