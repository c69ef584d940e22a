"""Random sequences and random autograd calls give the results of their stored twins."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from revnet import Checkpoint, ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.contracts.random_programs import FUNCTIONS, IN_PLACE_FUNCTIONS, draw_inputs, draw_sequence, run_program
from tests.helpers import assert_close, keep_all, leaves, stored_twin

EPS = torch.finfo(torch.float64).eps


def check_programs(seeds, *kinds, num_streams=lambda draw: 2) -> None:
    def make(seed):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        count = num_streams(draw)
        sequence = draw_sequence(draw, *kinds, num_streams=count)
        return sequence, draw_inputs(draw, count)

    for seed in seeds:
        sequence, inputs = make(seed)
        twin = stored_twin(sequence)
        observed = run_program(sequence, inputs, seed)
        expected = run_program(twin, copy.deepcopy(inputs), seed)
        assert len(observed) == len(expected), seed
        try:
            assert_close(observed, expected, tolerance=1e-7)  # Second derivatives amplify the rounding.
        except AssertionError:
            check_rounding(observed, expected, *make(seed), seed)


def check_rounding(observed, expected, sequence, inputs, seed) -> None:
    """Check that the results differ no more than those of a stored twin whose inputs are off by rounding.

    Rebuilt streams are off by a unit in the last place of the largest stream, which may be far larger than the input.
    """
    with torch.no_grad():
        size = max(float(y.abs().max()) for y in leaves([stored_twin(sequence)(x) for x in inputs]))
    inputs = tree_map(lambda x: (x.detach() + EPS * size).requires_grad_(x.requires_grad), inputs)
    perturbed = run_program(stored_twin(sequence), inputs, seed)
    for value, expected_value, other in zip(observed, expected, perturbed, strict=True):
        if isinstance(value, Tensor) and value.is_floating_point():
            assert (value - expected_value).norm() <= 100 * (other - expected_value).norm(), seed
        else:
            assert_close(value, expected_value)


@pytest.mark.parametrize(
    "seeds", [range(start, start + 25) for start in range(0, 150, 25)], ids=lambda seeds: f"{seeds.start}-"
)
def test_random_program(seeds):
    check_programs(seeds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(start, start + 100) for start in range(150, 2150, 100)], ids=lambda seeds: f"{seeds.start}-"
)
def test_two_thousand_random_programs(seeds):
    check_programs(seeds)


class KeepSome:
    """A rule of `Reverse(keep=...)` that keeps a random half of the outputs."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)

    def __call__(self, context, operator, *args, **kwargs) -> bool:
        return self.draw.random() < 0.5


KEEPING_POLICIES = [
    *[Reverse(hold=hold) for hold in ("f", "g", True)],
    *[Reverse(hold=hold, keep=keep) for hold in ((), "f", "g", True) for keep in (keep_all, KeepSome(0), "linear")],
    Reverse(keep="g.linear.0"),
    Reverse(keep="1KiB"),
    Reverse(),
    Store(),
]


@pytest.mark.parametrize(
    "seeds", [range(start, start + 25) for start in range(0, 100, 25)], ids=lambda seeds: f"{seeds.start}-"
)
def test_random_program_that_holds_and_keeps(seeds):
    check_programs(seeds, FUNCTIONS + 2 * IN_PLACE_FUNCTIONS, KEEPING_POLICIES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(start, start + 100) for start in range(100, 1100, 100)], ids=lambda seeds: f"{seeds.start}-"
)
def test_thousand_random_programs_that_hold_and_keep(seeds):
    check_programs(seeds, FUNCTIONS + 2 * IN_PLACE_FUNCTIONS, KEEPING_POLICIES)


SUMMING_POLICIES = [Reverse(), Reverse(), Checkpoint(), Store(), Reverse(hold=True, keep="linear"), Reverse(hold=True)]


def three_to_five(draw):
    return draw.randint(3, 5)


@pytest.mark.parametrize("seeds", [range(25), range(25, 50)], ids=lambda seeds: f"{seeds.start}-")
def test_random_program_whose_functions_read_sums(seeds):
    check_programs(seeds, FUNCTIONS + IN_PLACE_FUNCTIONS, SUMMING_POLICIES, num_streams=three_to_five)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(start, start + 100) for start in range(50, 1050, 100)], ids=lambda seeds: f"{seeds.start}-"
)
def test_thousand_random_programs_whose_functions_read_sums(seeds):
    check_programs(seeds, FUNCTIONS + IN_PLACE_FUNCTIONS, SUMMING_POLICIES, num_streams=three_to_five)


class ForeignNoise(nn.Module):
    """Multiplies the input by a number from a generator outside PyTorch."""

    def __init__(self, function: nn.Module, draw: random.Random):
        super().__init__()
        self.function, self.draw = function, draw

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * (1 + self.draw.random()))


@pytest.mark.parametrize("seed", range(40))
def test_random_numbers_from_outside_pytorch_raise(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    functions = [draw.choice(FUNCTIONS[:2] + FUNCTIONS[4:])() for _ in range(2 * draw.randint(1, 6))]
    position = draw.randrange(len(functions))
    functions[position] = ForeignNoise(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), random.Random(seed))
    blocks = [ReversibleBlock(f, g) for f, g in zip(functions[::2], functions[1::2], strict=True)]
    sequence = ReversibleSequential(*blocks, policy=draw.choice([Reverse(), Checkpoint()])).double()
    loss = sequence(torch.randn(8, 6, dtype=torch.float64)).square().sum()
    name = rf"blocks\.{position // 2}\.{'fg'[position % 2]}"
    with pytest.raises(ReconstructionError, match=f"`{name}` returned different numbers"):
        loss.backward()
