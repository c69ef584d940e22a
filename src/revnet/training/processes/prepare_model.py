"""Prepare a network for several devices: divide its parameters, or synchronize its batch norms."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.modules.batchnorm import _BatchNorm

from revnet.distributed import shard_blocks
from revnet.distributed._shard_units import units_of
from revnet.distributed._sync_batch_norm import synchronize_batch_norms
from revnet.nn._whole_model import policy_holders
from revnet.training.device import find_device
from revnet.training.processes.world import World, check_division, current_world, entered
from revnet.training.settings.run_config import AbstractRunConfig

_LOW = {"bf16-mixed": torch.bfloat16}
"""Dtypes in which a sharded network computes, by the precision of the settings."""


def check_processes(config: AbstractRunConfig, world: World) -> None:
    """Raise unless the settings go with the processes of `world`, before any of them is started.

    Raises:
        ValueError: The processes cannot divide the batches, or a setting does not go with several processes.
    """
    with entered(world):
        check_division(config.batch_size, num_parts=config.accumulate)
        if config.step_in_backward and strategy_name(config) == "ddp":
            raise ValueError(
                "`step_in_backward` (=True) does not go with several processes under ddp, which average the gradients "
                "after the backward pass; pass the `strategy` fsdp2, or leave it out."
            )
        if config.cuda_graphs and world.num_processes > 1:
            raise ValueError(
                f"`cuda_graphs` (=True) is for a single process, and there are {world.num_processes}; leave it out, or "
                "train on one GPU."
            )
    if config.cuda_graphs and (kind := find_device(config.device).type) != "cuda":
        raise ValueError(f"`cuda_graphs` (=True) needs a CUDA GPU, and the device is {kind}; leave it out.")
    if config.sync_batch_norm and (kind := find_device(config.device).type) != "cuda":
        raise ValueError(
            "`sync_batch_norm` (=True) needs GPUs, since PyTorch synchronizes batch norms on GPUs only, and the "
            f"device is {kind}; leave it out."
        )


def check_devices(config: AbstractRunConfig, model: nn.Module, name: str) -> None:
    """Raise unless the network can be trained on the devices of the settings.

    Args:
        config: Settings of the run.
        model: The network, whose tensors are not needed.
        name: Name of the network, for the error message.

    Raises:
        ValueError: A setting does not fit the network or the devices.
    """
    if config.strategy == "fsdp2" and not any(unit.is_reversible for unit in units_of(model)):
        raise ValueError(
            f"`strategy` (='fsdp2') divides reversible blocks among devices, and {name} has none; pass `ddp`."
        )
    if config.strategy == "fsdp2" and config.compile == "model" and any(unit.has_log_det for unit in units_of(model)):
        raise ValueError(
            f"`compile` (='model') does not go with the `strategy` fsdp2 for {name}, whose blocks have "
            "log-determinants and are divided by function; pass 'functions', or the strategy ddp."
        )
    if config.compile == "functions" and not compilable_functions(model):
        raise ValueError(f"`compile` (='functions') is for residual functions, and {name} has none; pass 'model'.")
    if config.sync_batch_norm and not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(f"`sync_batch_norm` (=True) is for networks with batch norms; {name} has none. Leave it out.")


def compilable_functions(model: nn.Module) -> list[nn.Module]:
    """Return the residual functions of a network, once each."""
    units = [unit for holder in policy_holders(model).values() for unit in holder.policy_units]
    return list(dict.fromkeys([function for unit in units if unit.is_reversible for function in unit.functions]))


def uses_fsdp2(config: AbstractRunConfig) -> bool:
    """Return whether the run divides the model among processes; a single process has nothing to divide."""
    return config.strategy == "fsdp2" and current_world().num_processes > 1


def strategy_name(config: AbstractRunConfig) -> str | None:
    """Return how the run divides the model among processes, or None for a single process."""
    if current_world().num_processes == 1:
        return None
    return "fsdp2" if uses_fsdp2(config) else "ddp"


def model_preparation(config: AbstractRunConfig) -> Callable[[nn.Module], None] | None:
    """Return a function that prepares the network in place once the processes are connected, if that is needed."""
    is_synchronized = config.sync_batch_norm and current_world().num_processes > 1
    is_sharded = uses_fsdp2(config)
    if not (is_synchronized or is_sharded):
        return None

    def prepare(model: nn.Module) -> None:
        if is_synchronized:
            synchronize_batch_norms(model)
        if is_sharded:
            # `fully_shard` cannot divide tensors that are contiguous in another layout.
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # PyTorch's stubs lack it
            dtype = _LOW.get(config.precision)
            float32 = None if dtype is None else torch.float32
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=float32, output_dtype=float32)
            shard_blocks(model, mp_policy=policy)

    return prepare
