"""Give policies to blocks of any model, in place, and take them away again."""

import torch
from torch import nn

from revnet._checks import check_module
from revnet.nn._repeated_blocks import ACCEPTED_BLOCKS, Blocks, named_blocks
from revnet.nn.policies._added_policy import RESERVED, AddedPolicy, add_policy, remove_policy
from revnet.nn.policies._has_policies import HasPolicies


def add_policies(model: nn.Module, blocks: Blocks = None) -> dict[str, nn.Module]:
    """Make blocks of any model units that have a policy, which is `Store()` at first.

    Afterwards, `set_policy`, `revnet.memory.plan` and everything else that handles policies works on the model, whose
    code need not be changed: `Checkpoint()` keeps the arguments of a block and computes its activations again, and
    `Offload()` keeps them on the host. `revnet.apply_budget` chooses among these for a budget.

    The class of each block is replaced by a subclass of the same name. The names of modules and the keys of the state
    dict remain, hooks on a block run once, `isinstance` holds, and copies and pickles keep the policies. Blocks that
    have policies from an earlier call and are not among `blocks` lose them.

    Batch-norm statistics and other buffers are updated once, dropout draws the same mask again, and a block may take
    and return anything. It must compute the same in both runs: a block that appends to a cache raises an error. In
    evaluation without gradients, policies have no effect.

    Args:
        model: The model. Modules that are reversible or have policies stay as they are.
        blocks: The blocks: a path pattern, in which `*` stands for one part of a name between dots, such as
            "transformer.h.*", a class, a module, or a sequence of these. None takes the blocks that the model repeats
            in its module lists and sequences.

    Returns:
        The blocks by name, in the order of the model.

    Raises:
        TypeError: An argument has the wrong type, or the class of a block has a metaclass of its own.
        ValueError: `blocks` names no module, modules inside each other, or one that cannot have a policy.

    Example:
        >>> from torch import nn
        >>> from revnet import set_policy
        >>> from revnet.nn import add_policies
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.f(x).relu()
        >>> model = nn.Sequential(Residual(), Residual(), nn.Linear(4, 2))
        >>> list(add_policies(model))
        ['0', '1']
        >>> set_policy(model, "checkpoint")
        >>> model[1].policies
        (Checkpoint(),)
    """
    check_module("model", model)
    chosen = named_blocks(model, blocks)
    if not chosen and not any(isinstance(module, HasPolicies) for module in model.modules()):
        raise ValueError(
            f"`model` (={type(model).__name__}) has no `ModuleList` or `Sequential` with several blocks of one class; "
            f"name its blocks in `blocks`: {ACCEPTED_BLOCKS}."
        )
    outer = {
        inner: name
        for name, module in model.named_modules()
        if isinstance(module, HasPolicies) and not isinstance(module, AddedPolicy)
        for inner in model.get_submodule(name).modules()
    }
    for name, block in chosen.items():
        _check_block(name, block, outer.get(block))
    remove_policies(model)
    try:
        for name, block in chosen.items():
            add_policy(block, name)
    except TypeError:
        remove_policies(model)
        raise
    return chosen


def remove_policies(model: nn.Module) -> None:
    """Take away the policies that `add_policies` or `apply_budget` gave to blocks of `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: Another tool has replaced the class of a block since then.

    Example:
        >>> from torch import nn
        >>> from revnet.nn import HasPolicies, add_policies, remove_policies
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
        >>> block = add_policies(model, "0")["0"]
        >>> isinstance(block, HasPolicies), type(block) is nn.Sequential
        (True, False)
        >>> remove_policies(model)
        >>> type(block) is nn.Sequential
        True
    """
    check_module("model", model)
    added = {name: module for name, module in model.named_modules() if isinstance(module, AddedPolicy)}
    for name, module in added.items():
        if "_class_before" not in vars(type(module)):
            raise ValueError(
                f"`{name}` of `model` had its class replaced again after it was given a policy, as `fully_shard` does, "
                "so the policy cannot be taken away; set `Store()` with `set_policy`, which has no effect on a step."
            )
    for module in added.values():
        remove_policy(module)


def _check_block(name: str, block: nn.Module, outer: str | None) -> None:
    """Raise unless the block can have a policy, which `outer`, the name of a module around it, may have too."""
    if isinstance(block, AddedPolicy):
        return
    kind = type(block)
    if isinstance(block, HasPolicies):
        reason = "has policies of its own; leave it out"
    elif outer is not None:
        reason = f"is inside `{outer or 'the model'}`, which has policies of its own; leave it out"
    elif any(isinstance(inner, HasPolicies) and not isinstance(inner, AddedPolicy) for inner in block.modules()):
        reason = "contains modules that have policies of their own; leave it out"
    elif isinstance(block, torch.jit.ScriptModule):
        reason = "is TorchScript, which cannot be changed; use the module that it was scripted from"
    elif "forward" in vars(block):
        reason = "has a `forward` of its own, set on the instance by a hook of another tool; add policies before that"
    elif block._compiled_call_impl is not None or kind.__name__ == "OptimizedModule":
        reason = "is compiled as a whole; compile the modules inside it, or add policies to the model alone"
    elif kind.forward is nn.Module.forward or issubclass(kind, nn.ModuleList | nn.ModuleDict):
        reason = f"is a {kind.__name__}, which is never called; name the modules inside it, as '{name}.*' does"
    elif taken := [attribute for attribute in RESERVED if hasattr(block, attribute)]:
        reason = f"has an attribute `{taken[0]}`, which modules with policies need for themselves; leave it out"
    else:
        return
    raise ValueError(f"`blocks` names `{name}` ({kind.__name__}), which {reason}.")
