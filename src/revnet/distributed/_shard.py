"""Shard a reversible model by block with `fully_shard`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.modules.batchnorm import _NormBase

from revnet._checks import check_choice, check_module, describe, is_integer
from revnet.distributed._shard_precision import LOW, CastInputs, StreamPrecision
from revnet.distributed._shard_units import Unit, shared_units, stream_modules, units_of
from revnet.nn import ReversibleSequential


def shard_blocks(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int = True,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    unit: Literal["block", "function"] = "block",
) -> FSDPModule:
    """Shard the parameters of `model` among processes, one reversible block at a time.

    This calls `torch.distributed.fsdp.fully_shard` on each block and then on the model, which keeps its stem and its
    head. Parameters, gradients and optimizer state are divided among the processes, and the activations of each process
    stay independent of the depth. Build the optimizer afterwards, and train as with any model that `fully_shard` has
    sharded.

    Blocks compute in `mp_policy.param_dtype`, but their streams stay in float32, or in the dtype of an exact coupling,
    so that they can be rebuilt. A `fully_shard` of your own with such a policy would cast the streams. If the stem
    returns a lower precision, the streams are cast up where the blocks begin, and the output is cast down again after
    them. Batch norms keep float32 parameters, because PyTorch requires them to match the running statistics.

    Modules that are already sharded stay as they are, so you may first shard a large head with `fully_shard(model.head,
    ...)`. Blocks that share parameters with other parts of the model are not sharded one by one; they stay with the
    model, whose parameters are whole during a step. Compile the blocks *before* you shard them, with `block.compile()`.

    Tested on the CPU with gloo; experimental on GPUs.

    Args:
        model: A model that contains reversible blocks. It is changed in place.
        mesh: Mesh of the processes, as for `fully_shard`. None takes all processes, and the accelerator if there is
            one.
        reshard_after_forward: Whether to free the gathered parameters of a block after its forward pass, as for
            `fully_shard`. The model's own parameters stay gathered until the backward pass.
        mp_policy: Mixed precision, as for `fully_shard`. `output_dtype` is the dtype of the model's output. None
            computes in the dtype of the parameters.
        offload_policy: Offloading of parameters to the CPU, as for `fully_shard`.
        unit: "block" gathers the parameters of a whole block at a time. "function" gathers one residual function at a
            time, which holds fewer gathered parameters and communicates more often. Blocks whose coupling has a
            log-determinant are always sharded by function.

    Returns:
        The same model, which is now also an `FSDPModule`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `model` has no reversible block, has a `tolerance`, is already sharded, or `unit` is not one of the
            two names. Or a function that would run uncompiled has been compiled.
        RuntimeError: There is no process group.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> from revnet.distributed import shard_blocks
        >>> # Under torchrun, `dist.init_process_group()` is enough.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(8)]
        >>> model = shard_blocks(ReversibleSequential(*blocks))
        >>> optimizer = torch.optim.AdamW(model.parameters())  # after sharding
        >>> model(torch.rand(3, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> dist.destroy_process_group()
    """
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    _check_arguments(model, mesh, reshard_after_forward, policy, offload_policy, unit)
    units = units_of(model)
    if not units:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block that could be sharded as a unit; build it from "
            "`ReversibleSequential`, or call `torch.distributed.fsdp.fully_shard`."
        )
    _check_tolerance(model)
    _check_compiled(units, unit)
    options: dict[str, Any] = {"mesh": _all_processes() if mesh is None else mesh}
    if offload_policy is not None:
        options["offload_policy"] = offload_policy
    _set_precision(model, units, policy)
    if policy.param_dtype in LOW:
        _shard_norms(model, units, policy, {**options, "reshard_after_forward": reshard_after_forward})
    inside = {id(parameter) for found in units for parameter in found.module.parameters()}
    has_others = any(id(parameter) not in inside for parameter in model.parameters())
    for part, part_policy in list(_parts_to_shard(units, shared_units(model, units), policy, unit)):
        if part is not model:
            fully_shard(part, mp_policy=part_policy, reshard_after_forward=reshard_after_forward, **options)
    # A model without layers around its blocks takes and returns streams, which keep their precision.
    policy = replace(policy, cast_forward_inputs=policy.cast_forward_inputs and has_others)
    return fully_shard(model, mp_policy=policy, **options)


def _check_arguments(
    model: Any, mesh: Any, reshard_after_forward: Any, mp_policy: Any, offload_policy: Any, unit: Any
) -> None:
    check_module("model", model)
    check_choice("unit", unit, ("block", "function"))
    if not isinstance(mp_policy, MixedPrecisionPolicy):
        raise TypeError(
            f"`mp_policy` (={describe(mp_policy)}) must be a `MixedPrecisionPolicy` of `torch.distributed.fsdp` or "
            "None; pass `MixedPrecisionPolicy(param_dtype=torch.bfloat16)`."
        )
    if not (offload_policy is None or isinstance(offload_policy, OffloadPolicy)):
        raise TypeError(
            f"`offload_policy` (={describe(offload_policy)}) must be an `OffloadPolicy` of `torch.distributed.fsdp` or "
            "None; pass `CPUOffloadPolicy()`."
        )
    if not (mesh is None or (isinstance(mesh, DeviceMesh) and mesh.ndim <= 2)):
        raise TypeError(
            f"`mesh` (={describe(mesh)}) must be a `DeviceMesh` of one or two dimensions, or None; build one with "
            "`torch.distributed.device_mesh.init_device_mesh`, or take one dimension of a larger mesh."
        )
    if mesh is None and not dist.is_initialized():
        raise RuntimeError(
            "`shard_blocks` needs a process group; start the program with `torchrun` and call "
            "`torch.distributed.init_process_group()` first."
        )
    if isinstance(model, FSDPModule):
        raise ValueError(
            f"`model` (={type(model).__name__}) is already sharded; call `shard_blocks` once, before any "
            "`fully_shard(model)`."
        )
    num_processes = dist.get_world_size() if mesh is None else mesh.size(mesh.ndim - 1)
    is_divisor = is_integer(reshard_after_forward) and 1 < reshard_after_forward < num_processes
    if not isinstance(reshard_after_forward, bool) and not (is_divisor and num_processes % reshard_after_forward == 0):
        raise ValueError(
            f"`reshard_after_forward` (={describe(reshard_after_forward)}) must be True, False, or a divisor of the "
            f"number of processes (={num_processes}) between 1 and that number; pass True."
        )


def _check_tolerance(model: nn.Module) -> None:
    for name, module in model.named_modules():
        tolerance = module.tolerance if isinstance(module, ReversibleSequential) else None
        if tolerance is not None:
            raise ValueError(
                f"`{name or type(model).__name__}` has a `tolerance` (={tolerance:g}), with which each process runs "
                "other functions again and would have to gather their parameters; reverse exactly with "
                "`set_coupling(model, FixedPoint())` and call `set_tolerance(model, None)`, or train with DDP."
            )


def _check_compiled(units: list[Unit], unit: str) -> None:
    for found in units:
        for part in found.parts_to_shard(unit):
            # Hooks of FSDP end a graph, and then PyTorch does not compile the code of its own modules.
            if part._compiled_call_impl is not None and type(part).forward.__module__.startswith("torch.nn."):
                way_out = "" if found.has_log_det else 'pass `unit="block"`, or '
                raise ValueError(
                    f"`unit` (={unit!r}) would run a compiled function of `{found.name}` (={type(part).__name__}) "
                    f"uncompiled; {way_out}write the function as a module with its own `forward`."
                )


def _all_processes() -> DeviceMesh:
    """Return the default mesh of `fully_shard`, which builds another one in each call."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return init_device_mesh("cpu" if accelerator is None else accelerator.type, (dist.get_world_size(),))


def _set_precision(model: nn.Module, units: list[Unit], policy: MixedPrecisionPolicy) -> None:
    """Keep streams in float32 where residual functions compute in a lower precision."""
    is_low = False
    for unit in units:
        dtype = policy.param_dtype or next((p.dtype for p in unit.module.parameters() if p.is_floating_point()), None)
        if unit.is_reversible and dtype is not None:
            is_low = is_low or dtype in LOW
            if policy.cast_forward_inputs and (policy.param_dtype is not None or dtype in LOW):
                for part in unit.parts:
                    part.register_forward_pre_hook(CastInputs(dtype), with_kwargs=True)
    if is_low:
        for module in stream_modules(model, units):
            StreamPrecision(module)


def _shard_norms(model: nn.Module, units: list[Unit], policy: MixedPrecisionPolicy, options: dict[str, Any]) -> None:
    """Shard the norms with running statistics apart from other layers, in the precision of these statistics."""
    whole = MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False)
    # One group for each residual function: a group that outlasts a function would be whole when the function is
    # recorded and divided when it is replayed, or the other way around.
    for part in [*(part for unit in units for part in unit.parts), model]:
        norms = [module for module in part.modules() if _has_statistics(module) and not isinstance(module, FSDPModule)]
        if norms:
            fully_shard(cast("Any", norms if len(norms) > 1 else norms[0]), mp_policy=whole, **options)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None and module.weight is not None


def _parts_to_shard(
    units: list[Unit], shared: set[nn.Module], policy: MixedPrecisionPolicy, unit: str
) -> Iterator[tuple[nn.Module, MixedPrecisionPolicy]]:
    """Yield the modules to shard, with the policy of each."""
    for found in units:
        if found.module in shared:
            continue
        # The hooks of a reversible unit's parts cast; a cast of the block's own inputs would cast the streams.
        casts = policy.cast_forward_inputs and not found.is_reversible
        for part in found.parts_to_shard(unit):
            if not isinstance(part, FSDPModule) and next(part.parameters(), None) is not None:
                yield part, replace(policy, cast_forward_inputs=casts, output_dtype=None)
