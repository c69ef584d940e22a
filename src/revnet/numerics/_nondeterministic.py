"""Find residual functions that return different bits when they run again."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from revnet._checks import check_count, check_step_arguments
from revnet.engine._determinism import repeat_function
from revnet.nn._restore import restoring_state
from revnet.nn._whole_model import policy_holders
from revnet.nn.blocks._blocks_in_runs import blocks_in_runs


class NondeterministicFunction(NamedTuple):
    """Residual function that returned different bits when it ran again."""

    name: str
    """Name in the model, such as "stages.0.reversible.blocks.3.f", or of a converted block "layer1.3"."""
    output_error: float
    """Relative error between the outputs of two runs, which makes reconstruction inexact; 0 if they were equal."""
    gradient_error: float
    """Largest relative error between the gradients of two runs, which affects stored activations too."""


def find_nondeterministic(
    model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, num_runs: int = 3
) -> tuple[NondeterministicFunction, ...]:
    """Return the residual functions of `model` that return different bits when they run again on this device.

    Reversal, and exact reversal above all, assumes that a residual function is deterministic: the same input, random
    state, buffers and autocast give the same bits. PyTorch's CPU kernels are deterministic for a fixed number of
    threads, and so are most GPU kernels. Kernels that add in the order of arrival (`index_add`, `scatter_add`, some
    backward passes) are not, unless `torch.use_deterministic_algorithms(True)` selects others.

    The model runs forward once, in its current mode and under the current autocast, and each residual function runs
    `num_runs` times on its input, forward and backward. Buffers, gradients and the random state are left unchanged.

    Args:
        model: A model with reversible blocks.
        inputs: Arguments of the model, with the size and on the device of training, since kernels depend on both.
        kwargs: Keyword arguments of the model.
        num_runs: Number of runs of each function; a race may need many to show.

    Returns:
        The functions whose results differed, in the order in which they ran. The tuple is empty if all were equal.

    Raises:
        TypeError: `model` is not a module, or `kwargs` not a dict.
        ValueError: `model` has no reversible block, or `num_runs` is not an integer of at least 2.
    """
    check_step_arguments(model, kwargs, None, None)
    check_count("num_runs", num_runs, least=2)
    functions = _functions_by_caller(model)
    if not functions:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block whose functions could be run again; build it "
            "from `ReversibleSequential`, or make it reversible with `revnet.convert`."
        )
    keywords = dict(kwargs or {})
    differing: dict[str, NondeterministicFunction] = {}
    is_running = False

    def probe(name: str, function: nn.Module) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal is_running
            if is_running:  # one function calls another one, or itself
                return
            is_running = True
            try:
                repetition = repeat_function(function, args, kwargs, num_runs)
            finally:
                is_running = False
            if repetition != (0.0, 0.0):
                differing.setdefault(name, NondeterministicFunction(name, *repetition))

        return before

    with ExitStack() as stack:
        for name, (caller, function) in functions.items():
            handle = caller.register_forward_pre_hook(probe(name, function), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(restoring_state(model))
        with torch.inference_mode(False), torch.enable_grad():
            model(*inputs, **keywords)
    return tuple(differing.values())


def _functions_by_caller(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return, by name and in order, the modules whose calls show inputs, and the functions to run on these inputs.

    They are the residual functions of all reversible blocks and units, each as both. A converted block is called with
    the input of its residual function, but it must not run by itself, so what it was originally runs.
    """
    callers: list[tuple[nn.Module, nn.Module]] = []
    for block in blocks_in_runs(model):
        callers += [(half_block.function, half_block.function) for half_block in block.half_blocks]
        if block.original is not None:
            callers.append((block.module, block.original))
    for holder in policy_holders(model).values():
        callers += [
            (function, function) for unit in holder.policy_units if unit.is_reversible for function in unit.functions
        ]
    # The first one counts: the unit of a converted block is the block itself.
    functions = {id(caller): function for caller, function in reversed(callers)}
    return {name: (module, functions[id(module)]) for name, module in model.named_modules() if id(module) in functions}
