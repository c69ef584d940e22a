"""Random sequences, asked random questions of autograd, answer as their stored twins do.

Each seed draws a sequence (depth, residual functions, tied weights, policies, what is frozen) and a program: calls
before any backward, partial gradients in any order over a retained graph, second derivatives.
"""

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import assert_close

FUNCTIONS = [
    lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.4), nn.Linear(3, 3)),
    lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)),
    lambda: nn.Identity(),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    lambda: nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()),
    lambda: nn.Sequential(nn.RReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))),
]


def draw_sequence(draw: random.Random) -> ReversibleSequential:
    shared = [draw.choice(FUNCTIONS)() for _ in range(3)]

    def function() -> nn.Module:
        return draw.choice(shared) if draw.random() < 0.3 else draw.choice(FUNCTIONS)()

    blocks = [ReversibleBlock(function(), function()) for _ in range(draw.randint(1, 7))]
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
        halves = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
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


@pytest.mark.parametrize(
    "seeds", [range(start, start + 25) for start in range(0, 150, 25)], ids=lambda r: f"{r.start}-"
)
def test_random_program(seeds):
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
