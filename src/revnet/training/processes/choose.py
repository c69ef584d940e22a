"""Choose the processes of a run from its settings, and check that the machine has what they ask for."""

import os
import warnings
from typing import Literal

import torch

from revnet.training.device import find_device
from revnet.training.processes.world import World, launched_world

NumDevices = int | Literal["auto"] | None
"""Number of devices on each node; `auto` takes all GPUs, None what a launcher has started, or one."""


def choose_world(device: str, devices: NumDevices, num_nodes: int | None = None) -> World:
    """Return the processes of a run as this process sees them.

    If no launcher has started any, the world is one that revnet starts itself, seen by its first process.

    Args:
        device: Name of a device, or `auto`.
        devices: Number of devices on each node.
        num_nodes: Number of nodes; None is the number that a launcher has started processes on.

    Raises:
        ValueError: There are fewer devices than that, or a launcher has started another number of processes.
    """
    launched = launched_world()
    if launched is not None:
        _check_launched(launched, devices, num_nodes)
    elif (num_nodes or 1) == 1 and devices in (None, 1):
        return World()
    elif (num_nodes or 1) > 1:
        raise ValueError(
            f"`num_nodes` (={num_nodes}) needs a launcher that starts this command on each node; put `srun` before it, "
            f"or `torchrun --nnodes {num_nodes} --nproc-per-node gpu --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            "--no-python`."
        )
    kind = find_device(device).type
    if launched is not None:
        world = launched
    else:
        num_auto = torch.cuda.device_count() if kind == "cuda" else 1
        world = World(num_processes=num_auto if devices == "auto" else devices or 1)
    if world.num_processes > 1:
        _check_available(kind, device, world)
    return world


def device_of(name: str, world: World) -> torch.device:
    """Return the device of this process."""
    device = find_device(name)
    if world.num_processes > 1 and device.type == "cuda":
        return torch.device("cuda", world.local_rank)
    return device


def _check_launched(launched: World, devices: NumDevices, num_nodes: int | None) -> None:
    numbers = {"devices": (devices, launched.num_local), "num_nodes": (num_nodes, launched.num_nodes)}
    for name, (given, actual) in numbers.items():
        if given not in (None, "auto", actual):
            what = "processes on each node" if name == "devices" else "nodes"
            raise ValueError(
                f"`{name}` (={given}) must equal the number of {what} that {launched.launcher} has started, {actual}; "
                "leave it out."
            )


def _check_available(kind: str, device: str, world: World) -> None:
    if ":" in device:
        raise ValueError(f"`device` (={device!r}) is a single device, and {world.num_local} are to be used; pass cuda.")
    if kind == "mps":
        raise ValueError(f"`devices` (={world.num_local}) must be 1 with the device mps, since a Mac has one GPU.")
    num_gpus = torch.cuda.device_count()
    if kind == "cuda" and world.num_local > num_gpus:
        raise ValueError(
            f"`devices` (={world.num_local}) must not exceed the {num_gpus} CUDA device{'s' * (num_gpus != 1)} that "
            f"this process can use; pass {num_gpus} or fewer."
        )
    num_cores = os.cpu_count() or 1
    if kind == "cpu" and world.num_local > num_cores and world.must_start:
        warnings.warn(
            f"`devices` (={world.num_local}) exceeds the {num_cores} core{'s' * (num_cores > 1)} of this machine, so "
            "processes will wait for each other.",
            stacklevel=2,
        )
