"""Models for the tests of the pipeline, and one process that computes what all stages compute."""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revnet import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.coupling import AbstractCoupling, Additive
from tests.helpers import ConvResidual

CHANNELS = 3


class Parts(nn.Module):
    """A stem, blocks and a head, and the functions by which one process calls them."""

    def __init__(self, blocks: ReversibleSequential, stem: nn.Module | None, head: nn.Module | None):
        super().__init__()
        self.stem, self.blocks, self.head = stem, blocks, head

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        x = x if self.stem is None else self.stem(x)
        x = self.blocks(x, *args, **kwargs)
        return x if self.head is None else self.head(x)


def conv_model(
    depth: int,
    *,
    coupling: AbstractCoupling | None = None,
    policy: AbstractPolicy | Sequence[AbstractPolicy] | None = None,
    tolerance: float | None = None,
    channels: int = CHANNELS,
) -> Parts:
    """Return a convolutional network with batch norm and dropout in every part, the same in every process."""
    torch.manual_seed(0)
    blocks = [
        ReversibleBlock(
            nn.Sequential(ConvResidual(channels), nn.Dropout(0.2)),
            nn.Sequential(nn.Dropout2d(0.2), ConvResidual(channels)),
            coupling=coupling or Additive(),
        )
        for _ in range(depth)
    ]
    sequence = ReversibleSequential(*blocks, policy=policy or Reverse(), tolerance=tolerance)
    stem = nn.Sequential(
        nn.Conv2d(2, 2 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(2 * channels), nn.Dropout(0.2)
    )
    head = nn.Sequential(nn.BatchNorm2d(2 * channels), nn.Flatten(), nn.Dropout(0.2), nn.LazyLinear(5))
    model = Parts(sequence, stem, head)
    head(torch.zeros(2, 2 * channels, 5, 5))  # makes the parameters of the lazy layer
    return model


def conv_batch(num_samples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 5, (num_samples,), generator=generator)


def seed_stage(index: int) -> None:
    torch.manual_seed(100 + index)


@contextmanager
def random_states_of_stages(model: Parts, counts: Sequence[int], states: list[Tensor]):
    """Let the parts of each stage draw from a random state of its own, as in separate processes."""
    current = 0

    def switch_to(index: int) -> None:
        nonlocal current
        states[current] = torch.get_rng_state()
        torch.set_rng_state(states[index])
        current = index

    before = torch.get_rng_state()
    torch.set_rng_state(states[0])
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    hooks = [
        model.blocks[first].half_blocks()[0].function.register_forward_pre_hook(lambda *_, i=index: switch_to(i))
        for index, first in enumerate(firsts)
        if index > 0
    ]
    try:
        yield lambda: switch_to(0)
        states[current] = torch.get_rng_state()
    finally:
        torch.set_rng_state(before)
        for hook in hooks:
            hook.remove()


def first_states(num_stages: int) -> list[Tensor]:
    return [torch.Generator().manual_seed(100 + index).get_state() for index in range(num_stages)]


def reference_step(
    model: Parts,
    counts: Sequence[int],
    batch: Tensor,
    target: Any,
    loss: Callable[[Any, Any], Tensor],
    num_microbatches: int,
    arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]] = lambda _: ((), {}),
    *,
    autocast: torch.dtype | None = None,
    states: list[Tensor] | None = None,
    is_copied: bool = True,
) -> tuple[Parts, float]:
    """Return a stored twin after the backward passes of all microbatches, and the mean loss.

    Args:
        states: Random states of the stages, which are updated; the default is new ones.
        is_copied: Whether to copy the model; otherwise it is the twin.
    """
    twin = copy.deepcopy(model) if is_copied else model
    twin.blocks.set_policies(Store())
    twin.blocks.tolerance = None
    states = first_states(len(counts)) if states is None else states
    size, total = len(batch) // num_microbatches, 0.0
    with random_states_of_stages(twin, counts, states) as begin:
        for number in range(num_microbatches):
            begin()
            part = slice(number * size, (number + 1) * size)
            args, kwargs = arguments(number)
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                value = loss(twin(batch[part], *args, **kwargs), target[part]) / num_microbatches
            value.backward()
            total += float(value.detach())
    return twin, total
