"""Random sequences, asked random questions of autograd, answer as their stored twins do.

Each seed draws a sequence (depth, residual functions, tied weights, policies, what is frozen, blocks with hooks and
with a `forward` of their own) and a program: inputs whose channels differ in scale, calls before any backward,
parameters that are thawed in between, partial gradients in any order over a retained graph, second derivatives.
"""

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from revnet import Checkpoint, ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import assert_close


class Averaged(nn.Module):
    """Keeps an average of its weight in a matrix that it writes through `.data`, where no version tells."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("average", torch.zeros(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.average.data.mul_(0.5).add_(self.linear.weight.data, alpha=0.5)
        return torch.tanh(self.linear(x)) @ self.average


class Wrapped(ReversibleBlock):
    """A block with a `forward` of its own."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs)


FUNCTIONS = [
    lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.4), nn.Linear(3, 3)),
    lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)),
    lambda: nn.Identity(),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    lambda: nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()),
    lambda: nn.Sequential(nn.RReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))),
    Averaged,
]


def draw_sequence(draw: random.Random) -> ReversibleSequential:
    shared = [draw.choice(FUNCTIONS)() for _ in range(3)]

    def function() -> nn.Module:
        return draw.choice(shared) if draw.random() < 0.3 else draw.choice(FUNCTIONS)()

    blocks = [
        (Wrapped if draw.random() < 0.15 else ReversibleBlock)(function(), function())
        for _ in range(draw.randint(1, 7))
    ]
    for block in blocks:
        if draw.random() < 0.1:
            block.register_forward_hook(lambda *_: None)
    if draw.random() < 0.2:
        blocks.append(blocks[0])
    policies = [draw.choice([Reverse(), Reverse(), Reverse(), Store()]) for _ in blocks]
    sequence = ReversibleSequential(*blocks, policy=policies).double()
    for parameter in sequence.parameters():
        parameter.requires_grad_(draw.random() < 0.75)
    return sequence.train(draw.random() < 0.8)


def draw_inputs(draw: random.Random) -> list[tuple[Tensor, Tensor] | Tensor]:
    """Inputs of one to three calls; pairs or tensors, some requiring gradients."""
    as_pair = draw.random() < 0.5
    inputs = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        scales = torch.tensor([10.0 ** draw.randint(-4, 2) if draw.random() < 0.1 else 1.0 for _ in range(3)])
        halves = [torch.randn(4, 3, dtype=torch.float64) * scales for _ in range(2)]
        if as_pair:
            inputs.append(tuple(half.requires_grad_(draw.random() < 0.6) for half in halves))
        else:
            inputs.append(torch.cat(halves, 1).requires_grad_(draw.random() < 0.6))
    return inputs


def leaves(values) -> list[Tensor]:
    return [leaf for value in values for leaf in (value if isinstance(value, tuple) else (value,))]


def run_program(sequence: ReversibleSequential, inputs: list, seed: int) -> list[Tensor]:
    """Everything that can be observed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    outputs = leaves([sequence(x) for x in inputs])
    observed = [output.detach().clone() for output in outputs]
    outputs = [output for output in outputs if output.requires_grad]
    wanted = [tensor for tensor in [*sequence.parameters(), *leaves(inputs)] if tensor.requires_grad]
    asked = {id(tensor) for tensor in wanted}
    toggled = [each for each in sequence.parameters() if id(each) not in asked and draw.random() < 0.3]
    for parameter in toggled:  # thawed after the forward pass, which nothing may notice
        parameter.requires_grad_()
    num_questions = draw.randint(1, 4) if outputs else 0
    for question in range(num_questions):
        chosen = draw.sample(outputs, draw.randint(1, len(outputs)))
        of = draw.sample(wanted, draw.randint(1, len(wanted)))
        loss = sum((index + 1) * output.square().sum() for index, output in enumerate(chosen))
        twice = draw.random() < 0.25
        gradients = torch.autograd.grad(
            loss, of, retain_graph=question < num_questions - 1 or twice, create_graph=twice, allow_unused=True
        )
        observed.append(torch.tensor([gradient is not None for gradient in gradients]))
        gradients = [gradient for gradient in gradients if gradient is not None]
        observed += [gradient.detach().clone() for gradient in gradients]
        penalty = sum(gradient.square().sum() for gradient in gradients if gradient.requires_grad)
        if twice and isinstance(penalty, Tensor):
            seconds = torch.autograd.grad(penalty, of, retain_graph=True, allow_unused=True)
            observed += [second for second in seconds if second is not None]
    return [*observed, *(buffer.clone() for buffer in sequence.buffers()), torch.get_rng_state()]


def check_programs(seeds) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        draw = random.Random(seed)
        sequence = draw_sequence(draw)
        twin = ReversibleSequential(*copy.deepcopy(list(sequence)), policy=Store())
        inputs = draw_inputs(draw)
        observed = run_program(sequence, inputs, seed)
        expected = run_program(twin, copy.deepcopy(inputs), seed)
        assert len(observed) == len(expected), seed
        for value, expected_value in zip(observed, expected, strict=True):
            assert_close(value, expected_value, tolerance=1e-7)  # second derivatives amplify the rounding


@pytest.mark.parametrize(
    "seeds", [range(start, start + 25) for start in range(0, 150, 25)], ids=lambda r: f"{r.start}-"
)
def test_random_program(seeds):
    check_programs(seeds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(start, start + 100) for start in range(150, 2150, 100)], ids=lambda r: f"{r.start}-"
)
def test_two_thousand_random_programs(seeds):
    check_programs(seeds)


class Outside(nn.Module):
    """Draws numbers that no random state of PyTorch knows."""

    def __init__(self, function: nn.Module, draw: random.Random):
        super().__init__()
        self.function, self.draw = function, draw

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * (1 + self.draw.random()))


@pytest.mark.parametrize("seed", range(40))
def test_randomness_from_outside_raises(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    functions = [draw.choice(FUNCTIONS[:2] + FUNCTIONS[4:])() for _ in range(2 * draw.randint(1, 6))]
    which = draw.randrange(len(functions))
    functions[which] = Outside(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), random.Random(seed))
    blocks = [ReversibleBlock(f, g) for f, g in zip(functions[::2], functions[1::2], strict=True)]
    sequence = ReversibleSequential(*blocks, policy=draw.choice([Reverse(), Checkpoint()])).double()
    loss = sequence(torch.randn(8, 6, dtype=torch.float64)).square().sum()
    with pytest.raises(ReconstructionError, match=rf"`blocks\.{which // 2}\.{'fg'[which % 2]}` gave other numbers"):
        loss.backward()
