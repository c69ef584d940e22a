"""Shard a model over processes, unit by unit."""

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from revnet.memory.distributed._distributed_memory import ShardUnit
from revnet.nn import AbstractReversibleBlock


def shard_units(model: nn.Module, *, mesh: DeviceMesh, unit: ShardUnit, reshard_after_forward: bool) -> None:
    """Apply `fully_shard` to each unit of a model, and then to the rest.

    Args:
        model: The model, on the meta device.
        mesh: The processes.
        unit: "block" for reversible blocks, "function" for their residual functions.
        reshard_after_forward: Whether units give up their gathered parameters between the passes. What is outside all
            units, such as stem and head, keeps them: the backward pass needs the head at once.
    """
    units = {id(module): module for module in _units(model, unit)}.values()
    num_owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    # A module that belongs to several units counts for each of them.
    num_owners += Counter(id(parameter) for module in units for parameter in module.parameters())
    for module in units:
        parameters = list(module.parameters())
        # Parameters that are shared with another unit stay with the rest, which is gathered as a whole.
        is_shared = any(num_owners[id(parameter)] > 2 for parameter in parameters)
        if module is not model and parameters and not is_shared:
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)


def _units(model: nn.Module, unit: ShardUnit) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, AbstractReversibleBlock):
            if unit == "block":
                yield module
            else:
                yield from (half_block.function for half_block in module.half_blocks())
