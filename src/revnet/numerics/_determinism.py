"""Which residual functions do not repeat themselves to the last bit."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from revnet.engine._determinism import repeat_function
from revnet.nn import AbstractReversibleBlock, policy_holders
from revnet.nn._restore import restoring_state


class NondeterministicFunction(NamedTuple):
    """A residual function that gave other bits when it ran again."""

    name: str
    """Its place in the model: "stages.0.reversible.blocks.3.f"."""
    output_error: float
    """Relative error between the outputs of two runs: what spoils reconstruction. 0 if they were the same."""
    gradient_error: float
    """The same of gradients, the largest: what a stored run suffers from too."""


def find_nondeterministic(
    model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, num_runs: int = 3
) -> tuple[NondeterministicFunction, ...]:
    """The residual functions of `model` that give other bits when they run again on this device.

    Reversal, the exact one above all, assumes that a residual function repeats itself: the same input, random state,
    buffers and autocast give the same bits. CPU kernels of PyTorch do, for a fixed number of threads, and most GPU
    kernels; those that add in the order of arrival (`index_add`, `scatter_add`, some backward passes) do not, unless
    `torch.use_deterministic_algorithms(True)` chooses others. The probe runs the model once, forward, in the mode and
    under the autocast that are in force, and each residual function `num_runs` times on what it reads, backward too.
    It leaves buffers, gradients and the random state as they were.

    Args:
        model: A model with reversible blocks.
        inputs: Its arguments, of the size and on the device of training: kernels depend on both.
        kwargs: Its keyword arguments.
        num_runs: How often each function runs; a race may need many runs to show.

    Returns:
        The functions that did not repeat themselves, in the order in which they ran; none, if reversal can be exact.

    Raises:
        ValueError: `model` has no reversible block, or `num_runs` is below 2.
    """
    if num_runs < 2:
        raise ValueError(f"`num_runs` (={num_runs}) must be 2 or more: runs are compared with each other.")
    functions = residual_functions(model)
    if not functions:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block whose functions could be run again; build it "
            "of `ReversibleSequential`."
        )
    named = dict(kwargs or {})
    found: dict[str, NondeterministicFunction] = {}
    at_work = False

    def probe(name: str) -> Any:
        def before(function: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal at_work
            if at_work:  # The function calls another one, or itself.
                return
            at_work = True
            try:
                repetition = repeat_function(function, args, kwargs, num_runs)
            finally:
                at_work = False
            if repetition != (0.0, 0.0):
                found.setdefault(name, NondeterministicFunction(name, *repetition))

        return before

    with ExitStack() as stack:
        for name, function in functions.items():
            handle = function.register_forward_pre_hook(probe(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(restoring_state(model))
        with torch.enable_grad():
            model(*inputs, **named)
    return tuple(found.values())


def residual_functions(model: nn.Module) -> dict[str, nn.Module]:
    """The residual functions of all reversible blocks and units of `model`, by their names, in order."""
    blocks = [module for module in model.modules() if isinstance(module, AbstractReversibleBlock)]
    ids = {id(half_block.function) for block in blocks for half_block in block.half_blocks()}
    for holder in policy_holders(model).values():
        ids |= {id(function) for unit in holder.policy_units if unit.is_reversible for function in unit.functions}
    return {name: module for name, module in model.named_modules() if id(module) in ids}
