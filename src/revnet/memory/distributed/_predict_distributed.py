"""Predict the memory and the communication of a training step on several devices."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from revnet._checks import check_bool, check_choice, check_count, describe
from revnet.errors import PredictionError
from revnet.memory.distributed._distributed_memory import DistributedMemory, ShardUnit, Strategy
from revnet.memory.distributed._equal_blocks import find_equal_blocks
from revnet.memory.distributed._predict_process import ProcessProgram, predict_replicated, predict_sharded
from revnet.memory.distributed._process_step import ProcessStep
from revnet.memory.distributed._splice import NotPeriodicError
from revnet.memory.distributed._summary import communication_of, device_memory
from revnet.memory.planning._training_step import TrainingStep
from revnet.memory.step._kept_fakes import checking_for_kept
from revnet.memory.step._optimizer import OptimizerFactory, as_factory
from revnet.memory.step._run_step import Loss, check_step

MOST_DEVICES = 1024


def predict_distributed(
    model: nn.Module,
    *inputs: Any,
    num_devices: int,
    strategy: Strategy,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    shard_unit: ShardUnit = "block",
    reshard_after_forward: bool = True,
    num_microbatches: int | None = None,
    rank: int = 0,
) -> DistributedMemory:
    """Count the bytes and the communication of a training step on several devices, without any of them.

    The step runs on fake tensors, in a process group without other processes, as one process of `num_devices`:

    * "ddp" replicates the model with `DistributedDataParallel`. Each device has all parameters and a part of the batch.
    * "fsdp2" shards the model with `revnet.distributed.shard_blocks`. Each device has a part of each parameter, and of
      the batch.
    * "pipeline" is a `revnet.distributed.Pipeline`. Each device has some of the blocks, which run on microbatches.

    The bytes are the bytes of processes on the CPU, which the `gloo` backend connects: tests compare them with 2 and 4
    real processes, to the byte. A real process may free a buffer a moment later, when a thread of `gloo` releases it.
    Prediction for GPUs is experimental: the same tensors exist, but the allocator and NCCL need more memory.

    Under "fsdp2", 1,000 equal blocks take as long as a few: runs of equal blocks are shortened, and the figures of the
    whole model follow from models that differ by a block. One more model checks that they do; if not, the whole model
    runs. Under "pipeline", equal stages are predicted together.

    Args:
        model: Any module, in the mode (training or evaluation) to predict. It may be on the meta device. It is not
            changed. A warning says if its code keeps a tensor elsewhere, as `predict` explains.
        inputs: Arguments of the model for the whole batch, which the devices divide: real tensors, or tensors on the
            meta device. Tensors whose first dimension is the size of the batch are divided.
        num_devices: Number of devices, from 1 to 1,024.
        strategy: Way to use them.
        kwargs: Keyword arguments of the model, divided like `inputs`.
        optimizer: Function that makes the optimizer from parameters, such as `torch.optim.AdamW`. None counts no
            optimizer.
        loss: Function from the model's output to a scalar; None for the sum of all outputs that require a gradient.
        autocast: Data type in which autocast runs the forward pass and the loss; None keeps the current setting.
        shard_unit: Module that is gathered at once under "fsdp2": "block" for a reversible block, "function" for a
            residual function, which needs less memory and more collectives.
        reshard_after_forward: Whether units give up their gathered parameters between the passes under "fsdp2".
        num_microbatches: Number of parts of the batch under "pipeline"; None for four times the number of devices.
        rank: Process that is predicted under "ddp" and "fsdp2". The first one has the most bytes.

    Raises:
        PredictionError: The model or the loss fails on inputs of these shapes, or needs the values of tensors.
        RuntimeError: This process is already in a process group.
        TypeError: An argument has the wrong type.
        ValueError: The batch cannot be divided by `num_devices`, no output requires a gradient, or an argument is out
            of range.
    """
    check_step(model, kwargs, loss, autocast)
    check_count("num_devices", num_devices, most=MOST_DEVICES)
    check_choice("strategy", strategy, get_args(Strategy))
    check_choice("shard_unit", shard_unit, get_args(ShardUnit))
    check_bool(reshard_after_forward=reshard_after_forward)
    check_count("rank", rank, least=0, most=num_devices - 1)
    factory = _checked_factory(optimizer)
    step = TrainingStep(model, inputs, dict(kwargs or {}), factory, loss, autocast, device="cpu")
    with checking_for_kept(model) as kept:
        program = ProcessProgram(model, step.args, step.kwargs, factory, loss, autocast, num_devices, rank, kept)
        if strategy == "pipeline":
            return _pipeline(program, step.num_samples, num_microbatches)
        if num_microbatches is not None:
            raise ValueError(
                f"`num_microbatches` (={describe(num_microbatches)}) is for strategy='pipeline'; leave it out for "
                f"{strategy!r}."
            )
        part = step.with_batch_size(_share(step.num_samples, num_devices))
        program = replace(program, args=part.args, kwargs=part.kwargs)
        return _data_parallel(program, strategy, shard_unit, reshard_after_forward)


def _data_parallel(
    program: ProcessProgram, strategy: Strategy, shard_unit: ShardUnit, reshard_after_forward: bool
) -> DistributedMemory:
    is_extrapolated = False
    if strategy == "ddp":
        process = predict_replicated(program)
    else:
        process, is_extrapolated = _sharded(program, shard_unit, reshard_after_forward)
    return DistributedMemory(
        strategy=strategy,
        num_devices=program.num_processes,
        devices=(device_memory(process, "each device"),),
        communication=communication_of(process),
        model_bytes=process.whole_parameter_bytes,
        is_extrapolated=is_extrapolated,
    )


def _pipeline(program: ProcessProgram, num_samples: int, num_microbatches: int | None) -> DistributedMemory:
    num_devices = program.num_processes
    if num_microbatches is None:
        num_microbatches = 4 * num_devices
    check_count("num_microbatches", num_microbatches)
    if num_microbatches < num_devices:
        raise ValueError(
            f"`num_microbatches` (={num_microbatches}) must be at least `num_devices` (={num_devices}), or some "
            f"devices would only wait; pass {4 * num_devices}."
        )
    if num_samples % num_microbatches:
        raise ValueError(
            f"`inputs` (={num_samples} samples) must be divisible by `num_microbatches` (={num_microbatches}); "
            f"pass {num_microbatches * -(-num_samples // num_microbatches)} samples."
        )
    if len(program.args) != 1 or not isinstance(program.args[0], Tensor) or program.kwargs:
        raise ValueError("`inputs` must be one tensor for strategy='pipeline', which divides it into microbatches.")
    from revnet.memory.distributed._predict_pipeline import predict_pipeline

    memory = predict_pipeline(program, num_microbatches)
    return DistributedMemory(
        strategy="pipeline",
        num_devices=num_devices,
        devices=memory.stages,
        communication=memory.communication,
        model_bytes=memory.model_bytes,
        is_extrapolated=memory.is_extrapolated,
    )


def _sharded(program: ProcessProgram, unit: ShardUnit, reshard_after_forward: bool) -> tuple[ProcessStep, bool]:
    shard = partial(_shard, unit=unit, reshard_after_forward=reshard_after_forward)
    runs = find_equal_blocks(program.model)
    if runs:
        try:
            return predict_sharded(program, shard, runs), True
        except (NotPeriodicError, PredictionError):
            pass  # The whole model runs, and reports an error that persists.
    return predict_sharded(program, shard, ()), False


def _shard(model: nn.Module, *, mesh: DeviceMesh, unit: ShardUnit, reshard_after_forward: bool) -> None:
    # Loading FSDP takes as long as loading the rest of PyTorch, and nothing else here needs it.
    from torch.distributed.fsdp import fully_shard

    from revnet.distributed import shard_blocks
    from revnet.distributed._shard_units import units_of

    if units_of(model):
        shard_blocks(model, mesh=mesh, unit=unit, reshard_after_forward=reshard_after_forward)
    else:
        fully_shard(model, mesh=mesh)


def _checked_factory(optimizer: Any) -> OptimizerFactory | None:
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` (={type(optimizer).__name__}) must make an optimizer from parameters, such as "
            "`torch.optim.AdamW`, because each device has parameters of its own."
        )
    return as_factory(optimizer, [])


def _share(num_samples: int, num_devices: int) -> int:
    """Return the number of samples of each device."""
    if num_samples % num_devices:
        raise ValueError(
            f"`inputs` (={describe(num_samples)} samples) must be divisible by `num_devices` (={num_devices}), so that "
            f"all devices have the same number; pass {num_devices * -(-num_samples // num_devices)}."
        )
    return num_samples // num_devices
