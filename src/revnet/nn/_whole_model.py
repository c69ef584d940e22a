"""Functions that change the policies, the couplings or the tolerance of a whole model."""

from torch import nn

from revnet._checks import check_module
from revnet.coupling import AbstractCoupling
from revnet.nn.blocks._abstract_block import check_coupling
from revnet.nn.blocks._blocks_in_runs import blocks_in_runs
from revnet.nn.blocks._coupling_layer import CouplingLayer
from revnet.nn.blocks._grouped_block import GroupedBlock
from revnet.nn.blocks._multi_stream_block import MultiStreamBlock
from revnet.nn.blocks._reversible_block import ReversibleBlock
from revnet.nn.blocks._reversible_sequential import ReversibleSequential
from revnet.nn.blocks._tolerance import checked_tolerance
from revnet.nn.policies._has_policies import HasPolicies, as_policy
from revnet.nn.policies._policy import AbstractPolicy

HAS_COUPLING = (ReversibleBlock, CouplingLayer, MultiStreamBlock, GroupedBlock)


def policy_holders(model: nn.Module) -> dict[str, HasPolicies]:
    """Return all modules of `model` that have policies, by name.

    Example:
        >>> from torch import nn
        >>> from revnet import PolicySequential
        >>> from revnet.nn._whole_model import policy_holders
        >>> model = nn.Sequential(PolicySequential(nn.Linear(2, 2)), nn.ReLU())
        >>> {name: module.policies for name, module in policy_holders(model).items()}
        {'0': (Store(),)}
    """
    check_module("model", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, HasPolicies)}


def set_policy(model: nn.Module, policy: AbstractPolicy | str) -> None:
    """Set the policy of every unit of `model` that accepts it.

    `Reverse()` is for reversible blocks only. All other units keep the policy that they have.

    Args:
        model: A model that contains reversible sequences, or a model of this library.
        policy: A policy or its name. `Store()`, or "store", turns the model into its stored twin.

    Raises:
        TypeError: `model` is not a module, or `policy` is not a policy.
        ValueError: No unit accepts the policy.

    Example:
        >>> from torch import nn
        >>> from revnet import Checkpoint, ReversibleBlock, ReversibleSequential, set_policy
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = nn.Sequential(nn.Linear(3, 4), ReversibleSequential(block))
        >>> set_policy(model, Checkpoint())
        >>> model[1].policies
        (Checkpoint(),)
    """
    policy = as_policy(policy)
    is_accepted = False
    for holder in policy_holders(model).values():
        accepts = [unit.accepts(policy) for unit in holder.policy_units]
        is_accepted = is_accepted or any(accepts)
        holder.set_policies([policy if new else old for new, old in zip(accepts, holder.policies, strict=True)])
    if not is_accepted:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no unit that accepts the policy {policy}; build it from "
            "`ReversibleSequential`, or wrap its other modules in a `PolicySequential`."
        )


def set_coupling(model: nn.Module, coupling: AbstractCoupling) -> None:
    """Set the coupling of all reversible blocks of `model`. The next forward pass uses it.

    This changes every `ReversibleBlock`, `CouplingLayer`, `MultiStreamBlock` and `GroupedBlock`. A `MomentumBlock` and
    a `LeapfrogBlock` keep their coupling. Parts of a model that are stored and not reversed, such as the first block of
    a RevNet stage, are always exact.

    Args:
        model: A model that contains reversible blocks.
        coupling: The coupling. `FixedPoint()` makes reversal exact.

    Raises:
        TypeError: `model` is not a module, or `coupling` is not a coupling.
        ValueError: `model` has no reversible block.

    Example:
        >>> from torch import nn
        >>> from revnet import FixedPoint, ReversibleBlock, ReversibleSequential, set_coupling
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = nn.Sequential(nn.Linear(3, 4), ReversibleSequential(block))
        >>> set_coupling(model, FixedPoint(12))
        >>> block.coupling
        FixedPoint(fraction_bits=12, is_wide=False)
    """
    check_module("model", model)
    check_coupling(coupling)
    blocks = [module for module in model.modules() if isinstance(module, HAS_COUPLING)]
    if not blocks:
        _refuse_if_converted(model, "whose couplings follow from their method")
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block that could take the coupling {coupling}; build "
            "it from `ReversibleSequential`."
        )
    for block in blocks:
        block.coupling = coupling


def set_tolerance(model: nn.Module, tolerance: float | None) -> None:
    """Bound the reconstruction error of all reversible sequences of `model`. The next forward pass uses the bound.

    Args:
        model: A model that contains reversible sequences.
        tolerance: A relative error such as 1e-3, as in `ReversibleSequential`, or None for no bound.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no reversible sequence, or `tolerance` is not a relative error.

    Example:
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential, set_tolerance
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = nn.Sequential(nn.Linear(3, 4), ReversibleSequential(block))
        >>> set_tolerance(model, 1e-3)
        >>> model[1].tolerance
        0.001
    """
    check_module("model", model)
    # Checked here, because assigning a module or a parameter would register it instead of calling the setter.
    tolerance = checked_tolerance(tolerance)
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    if not sequences:
        _refuse_if_converted(model, "which take no tolerance")
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible sequence whose error could be bounded; build it from "
            "`ReversibleSequential`."
        )
    for sequence in sequences:
        sequence.tolerance = tolerance


def _refuse_if_converted(model: nn.Module, reason: str) -> None:
    """Raise if a model has converted blocks, which the setters of sequences do not change."""
    if any(block.original is not None for block in blocks_in_runs(model)):
        raise ValueError(
            f"`model` (={type(model).__name__}) has converted blocks, {reason}; change their method with "
            "`revnet.conversion.set_method`, where `fraction_bits` makes reversal exact."
        )
