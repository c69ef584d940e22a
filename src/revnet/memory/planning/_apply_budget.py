"""Fit a model whose code cannot be changed into a memory budget."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from revnet._checks import check_module
from revnet.memory.planning._plan import Plan
from revnet.memory.planning._planner import plan
from revnet.memory.planning._timing import Timing
from revnet.memory.step._optimizer import OptimizerFactory
from revnet.memory.step._run_step import Loss
from revnet.nn import AbstractPolicy, add_policies, remove_policies
from revnet.nn._repeated_blocks import Blocks
from revnet.nn.policies._added_policy import AddedPolicy

_OWN_SWITCHES = ("grad_checkpointing", "gradient_checkpointing")
"""Attributes by which modules of timm and of transformers recompute activations."""
_WAYS_OUT = {
    "set_grad_checkpointing": "set_grad_checkpointing(False)",
    "activation_checkpointing_disable": "activation_checkpointing_disable()",
    "gradient_checkpointing_disable": "gradient_checkpointing_disable()",
}
"""Calls that turn them off, by the method of the model."""


def apply_budget(
    model: nn.Module,
    *inputs: Any,
    budget: str | int,
    blocks: Blocks = None,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    policies: Sequence[AbstractPolicy | str] | None = None,
    timing: Timing | None = None,
    step_in_backward: bool | Literal["auto"] = False,
    chunked_loss: bool | Literal["auto"] | None = None,
) -> Plan:
    """Fit a training step of any model into a memory budget, in the least time, and change the model in place.

    This is for a model whose architecture is given, such as one of timm or transformers. Its blocks become units with
    policies, as by `revnet.nn.add_policies`, and `plan` chooses a policy for each: `Checkpoint()` computes the
    activations of a block again, and `Store()` runs it as before. Outputs and gradients stay the same. The names of
    modules and the keys of the state dict do too. `revnet.nn.remove_policies` undoes the change.

    Reversible parts of the model are planned as well. The predicted peak is exact on a CPU, as by `predict`; the model
    only runs on fake tensors.

    Args:
        model: The model, in the mode in which it is trained. Not changed if an error is raised.
        inputs: See `plan`. For a model of transformers, pass `kwargs` with `use_cache=False`.
        budget: See `plan`.
        blocks: See `add_policies`. None takes the blocks that the model repeats; the plan lists them.
        kwargs: See `predict`.
        optimizer: See `predict`.
        loss: See `predict`.
        autocast: See `predict`.
        dtype: See `predict`.
        device: See `predict`.
        policies: Policies to choose from, such as `["offload", "store"]`; see `plan`. The cost of `Offload()` depends
            on the machine, so choose from it with `MeasuredTiming()`, on a GPU.
        timing: See `plan`.
        step_in_backward: See `plan`.
        chunked_loss: See `plan`.

    Returns:
        The plan, which prints as a table, with the predicted peak and the alternatives. Its method `apply` sets the
        same policies in another copy of the model, after `add_policies`.

    Raises:
        BudgetError: No plan fits. The error says how much memory is missing, and which batch size would fit.
        PredictionError: The model fails on fake tensors, or a block cannot run twice; leave that block out.
        ValueError: An argument is invalid, no block runs exactly once in a step, or the model recomputes activations by
            a switch of its own.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import apply_budget
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        >>> plan = apply_budget(model, torch.ones(4, 64, 8), budget="700KiB", blocks="layers.*")
        >>> plan.peak_bytes <= plan.budget_bytes
        True
        >>> [unit.policy for unit in plan.units]
        [Checkpoint(), Checkpoint(), Checkpoint(), Store()]
    """
    check_module("model", model)
    kind = type(model).__name__
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ValueError(f"`model` (={kind}) wraps the model; pass the model itself, `model.module`.")
    if kind == "OptimizedModule":
        raise ValueError(f"`model` (={kind}) is compiled; pass the model itself, before `torch.compile`.")
    with _undone_on_error(model):
        _check_own_switches(model, add_policies(model, blocks))
        chosen = plan(
            model,
            *inputs,
            budget=budget,
            kwargs=kwargs,
            optimizer=optimizer,
            loss=loss,
            autocast=autocast,
            dtype=dtype,
            device=device,
            policies=policies,
            timing=timing,
            step_in_backward=step_in_backward,
            chunked_loss=chunked_loss,
        )
        chosen.apply(model)
    return chosen


def _check_own_switches(model: nn.Module, blocks: Iterable[str]) -> None:
    """Raise if a block, or a module around it, recomputes activations by a switch of its own."""
    way_out = next((f" by `model.{call}`" for method, call in _WAYS_OUT.items() if hasattr(model, method)), "")
    for block in blocks:
        parts = block.split(".")
        for end in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:end]))
            for switch in _OWN_SWITCHES:
                if getattr(module, switch, False) is True:
                    raise ValueError(
                        f"`model` (={type(model).__name__}) recomputes the activations of `{block}` itself, since "
                        f"`{switch}` of its {type(module).__name__} is on; turn it off{way_out}, and let the plan "
                        "choose."
                    )


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give the blocks of `model` the policies that they had if an error is raised."""
    before = {module: module.policies for module in model.modules() if isinstance(module, AddedPolicy)}
    try:
        yield
    except BaseException:
        remove_policies(model)
        if before:
            add_policies(model, list(before))
        for module, policies in before.items():
            module.set_policies(policies)
        raise
