"""State that the backward pass of a program needs: random states, and the buffers as each step read them.

The graph keeps all of it as one tensor of bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revnet.engine._random import get_random_state
from revnet.engine.compile._program import Program, Step


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """State that the backward pass needs for one step."""

    random_states: list[Tensor]
    """State of each device; empty if the function draws no random numbers."""
    buffers: list[Tensor]
    """Values of the buffers at the positions `Program.kept`."""


def devices_of(x1: Tensor, tensors: Sequence[Tensor]) -> list[torch.device]:
    """Return all devices whose random state matters, in a fixed order."""
    # Always the CPU: a function on another device may draw there before it copies.
    devices = {torch.device("cpu"), x1.device, *(tensor.device for tensor in tensors)}
    return sorted((device for device in devices if device.type != "meta"), key=str)


def keep(
    program: Program, step: Step, draws: bool, random_states: Sequence[Tensor], buffers: Sequence[Tensor]
) -> list[Tensor]:
    """Return copies of the state that the backward pass needs for a step; call it before the step runs."""
    return [*(random_states if draws else []), *(buffers[position].clone() for position in program.kept(step))]


def num_bytes(program: Program, devices: Sequence[torch.device], buffers: Sequence[Tensor]) -> int:
    """Return the number of bytes that a program keeps."""
    # The states are real even while tracing; only their size counts.
    states = sum(get_random_state(device).numel() for device in devices)
    size = sum(states for draws in program.known_findings.draws if draws)
    kept = [buffers[position] for step in program.steps for position in program.kept(step)]
    return size + sum(buffer.numel() * buffer.element_size() for buffer in kept)


def pack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the bytes of all tensors, concatenated."""
    # One tensor instead of one per step: a graph of a thousand half-blocks would otherwise carry thousands of them.
    pieces = [tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device) for tensor in tensors]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)


def unpack(program: Program, state: Tensor, devices: Sequence[torch.device], buffers: Sequence[Tensor]) -> list[Kept]:
    """Return the state of each step from the result of `pack`."""
    position = 0

    def take(like: Tensor) -> Tensor:
        nonlocal position
        size = like.numel() * like.element_size()
        piece = state[position : position + size].clone()  # A copy, so that it is aligned.
        position += size
        return piece.view(like.dtype).view(like.shape).to(like.device)

    now = [get_random_state(device) for device in devices]  # Only for their sizes.
    return [
        Kept([take(old) for old in now] if draws else [], [take(buffers[number]) for number in program.kept(step)])
        for step, draws in zip(program.steps, program.known_findings.draws, strict=True)
    ]
