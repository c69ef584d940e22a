"""Random sequences, and random autograd calls on them.

A seed draws a sequence (depth, residual functions, tied weights, policies, frozen parameters, blocks with hooks and
blocks that override `forward`) and a program: inputs whose channels differ in scale, several calls before the backward
pass, parameters that are unfrozen in between, partial gradients in any order over a retained graph, second derivatives.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from revnet import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, Store, set_coupling
from revnet.coupling import BDIA, AbstractCoupling, ExactScaled, Momentum, Scaled
from revnet.nn import GroupedBlock
from tests.helpers import leaves


class Averaged(nn.Module):
    """Keeps an average of its weight in a matrix that it writes through `.data`, which does not raise the version.

    Plain autograd saves the matrix itself, so it differentiates with the values that a later call has written. With
    `copies` it differentiates with the values that the call has used.
    """

    copies = False

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("average", torch.zeros(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.average.data.mul_(0.5).add_(self.linear.weight.data, alpha=0.5)
        return torch.tanh(self.linear(x)) @ (self.average.clone() if self.copies else self.average)


class Wrapped(ReversibleBlock):
    """A block that overrides `forward`."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs)


class WrappedGroups(GroupedBlock):
    """A block of several streams that overrides `forward`."""

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


class InPlace(nn.Module):
    """Writes to the result of a matrix product of three dimensions, whose version counter is not its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x.expand(2, 4, 3) @ self.weight)
        return torch.sin((y @ self.weight).mul_(2)).add_(x).sum(0)


# The inverse of each magnifies errors little enough for the bounds of the tests.
COUPLINGS = [
    Scaled.midpoint(),
    Scaled.leapfrog(0.5),
    Scaled.consistent(-0.8),
    Scaled(0.9, 0.5, -0.2),
    Momentum(0.9),
    ExactScaled(Scaled.consistent(0.5), 24, is_wide=True),
    ExactScaled(Scaled.dual(0.9, -0.25), 24, is_wide=True),
    BDIA(0.5, 12, is_wide=True),  # Streams grow, in particular if functions read sums.
    BDIA(0.25, 12, is_wide=True),
]

IN_PLACE_FUNCTIONS = [
    InPlace,
    lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Dropout(0.4, inplace=True)),
    lambda: nn.Sequential(nn.Linear(3, 4), nn.ELU(inplace=True), nn.Linear(4, 3, bias=False), nn.Tanh()),
]


def draw_sequence(
    draw: random.Random,
    functions: Sequence[Callable[[], nn.Module]] = FUNCTIONS,
    policies: Sequence[AbstractPolicy] = (Reverse(), Reverse(), Reverse(), Store()),
    couplings: Sequence[AbstractCoupling] = COUPLINGS,
    num_streams: int = 2,
) -> ReversibleSequential:
    """Return a sequence of `ReversibleBlock`, or with more than two streams of `GroupedBlock`."""
    shared = [draw.choice(functions)() for _ in range(3)]

    def function() -> nn.Module:
        return draw.choice(shared) if draw.random() < 0.3 else draw.choice(functions)()

    wrapped, plain = (Wrapped, ReversibleBlock) if num_streams == 2 else (WrappedGroups, GroupedBlock)
    blocks = [
        (wrapped if draw.random() < 0.15 else plain)(*[function() for _ in range(num_streams)])
        for _ in range(draw.randint(1, 7))
    ]
    for block in blocks:
        if draw.random() < 0.1:
            block.register_forward_hook(lambda *_: None)
    if draw.random() < 0.2:
        blocks.append(blocks[0])
    sequence = ReversibleSequential(*blocks, policy=[draw.choice(policies) for _ in blocks]).double()
    if draw.random() < 0.3:
        set_coupling(sequence, draw.choice(couplings))
    for parameter in sequence.parameters():
        parameter.requires_grad_(draw.random() < 0.75)
    return sequence.train(draw.random() < 0.8)


def draw_inputs(draw: random.Random, num_streams: int = 2) -> list[tuple[Tensor, ...] | Tensor]:
    """Return inputs of one to three calls, as tuples or tensors, some of which require gradients."""
    as_pair = draw.random() < 0.5
    inputs = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        scales = torch.tensor([10.0 ** draw.randint(-4, 2) if draw.random() < 0.1 else 1.0 for _ in range(3)])
        halves = [torch.randn(4, 3, dtype=torch.float64) * scales for _ in range(num_streams)]
        if as_pair:
            inputs.append(tuple(half.requires_grad_(draw.random() < 0.6) for half in halves))
        else:
            inputs.append(torch.cat(halves, 1).requires_grad_(draw.random() < 0.6))
    return inputs


def second_derivatives(penalty: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(penalty, of, retain_graph=True, allow_unused=True)


def run_program(
    sequence: ReversibleSequential,
    inputs: list,
    seed: int,
    *,
    call: Callable | None = None,
    differentiate_again: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]] = second_derivatives,
) -> list[Tensor | None]:
    """Return all observable results; None stands for a gradient that autograd does not compute.

    Args:
        sequence: Sequence to run.
        inputs: Inputs of the calls.
        seed: Seed of the program.
        call: Function to call instead of the sequence, such as its compiled form.
        differentiate_again: Function that computes second derivatives.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    outputs = leaves([(call or sequence)(x) for x in inputs])
    observed = [output.detach().clone() for output in outputs]
    outputs = [output for output in outputs if output.requires_grad]
    wanted = [tensor for tensor in [*sequence.parameters(), *leaves(inputs)] if tensor.requires_grad]
    asked = {id(tensor) for tensor in wanted}
    toggled = [parameter for parameter in sequence.parameters() if id(parameter) not in asked and draw.random() < 0.3]
    for parameter in toggled:  # unfrozen after the forward pass, which must have no effect
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
        observed += [None if gradient is None else gradient.detach().clone() for gradient in gradients]
        penalty = sum(
            gradient.square().sum() for gradient in gradients if gradient is not None and gradient.requires_grad
        )
        if twice and isinstance(penalty, Tensor):
            observed += differentiate_again(penalty, of)
    return [*observed, *(buffer.clone() for buffer in sequence.buffers()), torch.get_rng_state()]
