"""Compare the gradients of rebuilt activations with the gradients of stored activations.

References:
    Gomez et al. (2017), The Reversible Residual Network, section 5: the angle between the two during training.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from revnet.nn import (
    AbstractPolicy,
    AbstractReversibleBlock,
    Reverse,
    ReversibleSequential,
    Store,
    set_policy,
)
from revnet.nn._restore import restoring_policies, restoring_state
from revnet.numerics._gradients import Gradients, angle_and_error, parameter_gradients

ALL = "all"
"""Name of the group of all parameters."""


@dataclass(frozen=True)
class GradientError:
    """Difference between two gradients of a group of parameters, each seen as one vector."""

    group: str
    """Name of a part of the network, or `ALL`."""
    angle_degrees: float
    """Angle between the gradient from rebuilt activations and the gradient from stored activations."""
    relative_error: float
    """Distance between the two, divided by the length of the stored gradient."""
    reference_angle_degrees: float | None = None
    """Angle between the stored gradient and its value in float64: the rounding of plain autograd."""
    reference_relative_error: float | None = None
    """Distance between the two, divided by the length of the float64 gradient."""


def gradient_errors(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    *inputs: Any,
    with_reference: bool = False,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[GradientError]:
    """Compare the gradients of `model` under `Reverse()` with those under `Store()`.

    Both steps see the same weights, inputs, buffers and random numbers. The function does not change the model's
    policies, buffers and gradients (`.grad`), or the random state.

    Args:
        model: A model with reversible blocks in `ReversibleSequential`, in training or evaluation mode.
        loss_fn: Function that maps the output of the model to a scalar.
        inputs: Arguments of the model.
        with_reference: Whether to compute the stored gradients in float64 too, to measure the error of plain autograd.
        forward_context: Context for each forward pass and its loss, such as autocast. Not used in float64.

    Returns:
        One entry for each group of trained parameters: the stem, each stage, the head, and `ALL`.

    Raises:
        ValueError: The model has no reversible block, one that cannot be stored, or no parameter to train.

    Numerics:
        Lengths are summed in float64. Angles use Kahan's formula, which is accurate for small angles. On the CPU a step
        repeats exactly; on CUDA, kernels that add in arbitrary order set a lower limit on the errors.

    References:
        Kahan (2006), How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?, section 12.
    """
    check_reversible(model)
    groups = parameter_groups(model)

    def gradients(policy: AbstractPolicy) -> Gradients:
        with restoring_state(model), _under(model, policy):
            return parameter_gradients(model, loss_fn, inputs, forward_context)

    stored, rebuilt = gradients(Store()), gradients(Reverse())
    exact = _float64_gradients(model, loss_fn, inputs) if with_reference else None
    errors = []
    for group, names in groups.items():
        expected = [stored[name] for name in names]
        error = angle_and_error([rebuilt[name] for name in names], expected)
        reference = angle_and_error(expected, [exact[name] for name in names]) if exact is not None else (None, None)
        errors.append(GradientError(group, *error, *reference))
    return errors


def check_reversible(model: nn.Module) -> None:
    """Raise an error unless all reversible blocks of `model` can be stored too.

    Raises:
        ValueError: The model has no reversible block, or one outside a `ReversibleSequential`.
    """
    sequences = _sequences(model)
    in_sequences = {id(block) for sequence in sequences for block in sequence}
    for name, module in model.named_modules():
        if isinstance(module, AbstractReversibleBlock) and id(module) not in in_sequences:
            raise ValueError(
                f"`model` (={type(model).__name__}) has the block `{name}` outside a ReversibleSequential, where it "
                "cannot be stored; put it into one."
            )
    if not in_sequences:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block, so nothing is rebuilt; pass a "
            "reversible model, such as `revnet38`."
        )


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the trainable parameters, by part of the network.

    Modules before the first reversible part form the stem, and modules after the last one form the head. A container of
    reversible parts, such as the stages of a RevNet, is divided into its parts.

    Args:
        model: A model whose children are registered in the order in which they run.

    Returns:
        The names of each group's parameters. The group `ALL` comes last.

    Raises:
        ValueError: The model has no parameter to train.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError(f"`model` (={type(model).__name__}) has no parameter that requires a gradient; unfreeze one.")
    children = list(model.named_children())
    reversible = [index for index, (_, child) in enumerate(children) if _is_reversible(child)]
    positions = {child: index for index, (child, _) in enumerate(children)}
    groups: dict[str, list[str]] = {}
    for name in names:
        child, _, rest = name.partition(".")
        index = positions.get(child, -1)  # -1: a parameter of the model itself, such as a class token
        if index < min(reversible, default=0):
            group = "stem"
        elif index > max(reversible, default=0):
            group = "head"
        else:
            part, _, _ = rest.partition(".")
            is_divided = _is_divided(children[index][1])
            group = _part_name(child, part) if is_divided else child
        groups.setdefault(group, []).append(name)
    return groups | {ALL: names}


def _is_reversible(module: nn.Module) -> bool:
    return any(isinstance(part, ReversibleSequential | AbstractReversibleBlock) for part in module.modules())


def _is_divided(module: nn.Module) -> bool:
    parts = list(module.children())
    return not isinstance(module, ReversibleSequential) and len(parts) > 1 and all(map(_is_reversible, parts))


def _part_name(container: str, part: str) -> str:
    return f"stage {int(part) + 1}" if container == "stages" and part.isdigit() else f"{container}.{part}"


def _sequences(model: nn.Module) -> list[ReversibleSequential]:
    return [module for module in model.modules() if isinstance(module, ReversibleSequential)]


@contextmanager
def _under(model: nn.Module, policy: AbstractPolicy) -> Iterator[None]:
    """Set the policy of all units of `model` temporarily."""
    with restoring_policies(model):
        set_policy(model, policy)
        yield


def _float64_gradients(model: nn.Module, loss_fn: Callable[[Any], Tensor], inputs: tuple[Any, ...]) -> Gradients:
    # A copy, since `torch.func.functional_call` does not restore a module that is registered twice.
    exact = copy.deepcopy(model)._apply(_double)
    with restoring_state(exact), _under(exact, Store()):
        return parameter_gradients(exact, loss_fn, tree_map_only(Tensor, _double, inputs), nullcontext)


def _double(tensor: Tensor) -> Tensor:
    has_rounding = tensor.is_floating_point() or tensor.is_complex()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64)) if has_rounding else tensor
