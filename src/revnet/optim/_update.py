"""Update one parameter with an optimizer of many."""

from collections import OrderedDict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# Attributes in which the optimizers of PyTorch remember that a check or a warning was done. To repeat it is harmless.
_REMINDERS = ("_need_device_dtype_check", "_warned")


def update_parameter(optimizer: Optimizer, group_index: int, parameter: Tensor) -> None:
    """Run the step of `optimizer` on a single parameter, with its own gradient, options and state.

    The hooks of the optimizer do not run.

    Args:
        optimizer: The optimizer. Its groups are not touched, so a step that is in progress is not disturbed.
        group_index: Index of the parameter's group. Options may have changed since the last step: `load_state_dict`
            replaces the group.
        parameter: The parameter, with a gradient.

    Raises:
        NotImplementedError: The optimizer keeps numbers for all parameters together.
    """
    group = optimizer.param_groups[group_index]
    alone = {**group, "params": [parameter]}
    # A second optimizer on the same state. Swapping the groups of the first one would not be safe: the backward passes
    # of several devices run in several threads.
    view: Optimizer = object.__new__(type(optimizer))
    attributes: dict[str, Any] = {
        **optimizer.__dict__,
        "param_groups": [alone],
        "_optimizer_step_pre_hooks": OrderedDict(),
        "_optimizer_step_post_hooks": OrderedDict(),
    }
    vars(view).update(attributes)
    _step_without_hooks(view)
    written = [name for name, value in alone.items() if name != "params" and value is not group.get(name)]
    written += [
        name
        for name, value in vars(view).items()
        if value is not attributes.get(name) and not name.startswith(_REMINDERS)
    ]
    if written:
        raise NotImplementedError(
            f"`optimizer` (={type(optimizer).__name__}) writes `{written[0]}` in a step, which it keeps for all "
            "parameters together, so it cannot update one parameter at a time; train it without `StepInBackward`."
        )


def _step_without_hooks(optimizer: Optimizer) -> None:
    """Run the method of the class: a scheduler replaces the method of the object, and a decorator runs the hooks."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)
