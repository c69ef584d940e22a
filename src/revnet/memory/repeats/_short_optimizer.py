"""Count the memory of an optimizer of many parameters from steps on some of them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from revnet._torch_internals import unset_fake_temporarily
from revnet.memory.repeats._frame import AmbiguousError, Frame, Label, NotRepeatedError
from revnet.memory.repeats._library import Library
from revnet.memory.repeats._pieces import MOMENT_COLUMNS, Grid, Joined, Piece, Places
from revnet.memory.repeats._windows import positions_to_show
from revnet.memory.step._optimizer import (
    OptimizerCost,
    OptimizerFactory,
    explained,
    fake_optimizer,
    fake_parameter,
    make_optimizer,
    storage_bytes,
)
from revnet.memory.step._recorder import Recorder
from revnet.memory.step._run_step import tensors_in
from revnet.memory.step._step_log import Integers, live_bytes
from revnet.memory.step._storage_watch import StorageWatch


def short_optimizer_cost(
    factory: OptimizerFactory,
    parameters: Sequence[Tensor],
    gradients: Sequence[torch.layout | None],
    device_type: str,
) -> OptimizerCost:
    """Return what `optimizer_cost` returns, from steps in which only some parameters have gradients.

    Raises:
        NotRepeatedError: The optimizer does not treat one parameter after the other, equal ones differ, or a gradient
            is sparse.
    """
    if not {*gradients} <= {None, torch.strided}:
        raise NotRepeatedError
    device_type = "cpu" if device_type == "meta" else device_type
    with fake_optimizer(device_type):
        kinds = [_kind_of(parameter) for parameter in parameters]
        fakes = _meta_parameters(parameters, kinds)
        order, labels = _chain(make_optimizer(factory, fakes), fakes, kinds, gradients)
        library = Library()
        windows = library.windows(labels)
        ends = [index for index in range(len(labels)) if labels[index : index + 2][-1].row != labels[index].row]
        for num_examples in (2, 3):
            shown = positions_to_show(windows, (), [0, len(labels) - 1, *ends], num_examples=num_examples)
            chosen = {index: fake_parameter(parameters[order[index]], torch.strided) for index in shown[1:]}
            replaced = {order[index]: fake for index, fake in chosen.items()}
            optimizer = make_optimizer(factory, [replaced.get(index, fake) for index, fake in enumerate(fakes)])
            step = _Step(factory, optimizer, list(chosen.values()), device_type)
            step.add_to(library, [labels[index] for index in shown])
    pieces = [library.known[window] for window in windows]
    passes = pieces[0].lengths
    return _cost(Joined(pieces, Frame(labels), [True] * len(passes)))


def _meta_parameters(parameters: Sequence[Tensor], kinds: Sequence[Hashable]) -> list[nn.Parameter]:
    """Return parameters on the meta device. They take less time to make than fake ones."""
    data: dict[Hashable, Tensor] = {}
    with unset_fake_temporarily():
        for parameter, kind in zip(parameters, kinds, strict=True):
            if kind not in data:
                data[kind] = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
                )
        return [
            nn.Parameter(data[kind], parameter.requires_grad) for parameter, kind in zip(parameters, kinds, strict=True)
        ]


def _kind_of(parameter: Tensor) -> Hashable:
    return parameter.shape, parameter.stride(), parameter.dtype, parameter.device, parameter.requires_grad


def _chain(
    optimizer: Optimizer, fakes: Sequence[Tensor], kinds: Sequence[Hashable], gradients: Sequence[torch.layout | None]
) -> tuple[list[int], list[Label]]:
    """Return the index and the label of each parameter that the optimizer updates, in order, after a first position."""
    index_of = {id(fake): index for index, fake in enumerate(fakes)}
    order, labels = [-1], [Label("head", 0, 0)]
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            index = index_of[id(parameter)]
            if gradients[index] is not None:
                order.append(index)
                labels.append(Label(number, kinds[index], 0))
    return order, labels


class _Step:
    """The second step of an optimizer on some parameters.

    Args:
        factory: Function that made the optimizer.
        optimizer: The optimizer.
        parameters: Parameters with gradients, in the order in which the optimizer has them.
        device_type: Type of the device on which bytes count.
    """

    def __init__(self, factory: OptimizerFactory, optimizer: Optimizer, parameters: Sequence[Tensor], device_type: str):
        with explained(factory, "cannot take a step on gradients alone"):
            optimizer.step()
        if any(not isinstance(key, Tensor) or key.grad is None for key in optimizer.state):
            raise NotRepeatedError
        own = [[parameter, parameter.grad, *tensors_in(optimizer.state.get(parameter))] for parameter in parameters]
        states = [
            [tensor for tensor in tensors_in(optimizer.state.get(parameter)) if tensor.device.type == device_type]
            for parameter in parameters
        ]
        self.state_bytes = [storage_bytes(state) for state in states]
        state = [tensor for tensors in states for tensor in tensors]
        if storage_bytes(state) != sum(self.state_bytes):
            raise NotRepeatedError
        position_of = {
            tensor.untyped_storage()._cdata: position
            for position, tensors in enumerate(own, start=1)
            for tensor in tensors
            if tensor is not None
        }
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        storages = StorageWatch([*every, *gradients, *state], device_type)
        recorder = _ParameterRecorder(storages, position_of)
        with recorder:
            recorder.end_forward()
            optimizer.step()
            recorder.end()
        self.log = recorder.log()
        self.positions = np.array([*recorder.positions, recorder.position], np.int64)
        self.num_positions = len(parameters) + 1

    def add_to(self, library: Library, labels: Sequence[Label]) -> None:
        """Add the pieces of the step."""
        log, positions = self.log, self.positions
        # A new pass begins where the optimizer returns to an earlier parameter.
        passes = np.cumsum(np.diff(positions, prepend=0) < 0, dtype=np.int64)
        ascending = [True] * int(passes[-1] + 1)
        library.share("passes", len(ascending))
        grid = Grid.of(passes, positions, self.num_positions, ascending)
        places = Places(grid, passes, positions, Frame(labels))
        own = positions[log.births]
        rows = np.zeros((len(log.births), 2 + MOMENT_COLUMNS), np.int64)
        rows[:, 0] = log.births - grid.starts[passes[log.births], own]
        rows[:, 1] = log.sizes
        rows[:, 2:] = places.moments(log.deaths, own)
        state_bytes = [0, *self.state_bytes]
        for index, window in enumerate(library.windows(labels)):
            piece = Piece(
                lengths=grid.lengths[:, index].copy(),
                events=[],
                storages=[rows[(own == index) & (passes[log.births] == number)] for number in range(len(ascending))],
                calls=np.zeros((0, 0), np.int64),
                facts=(state_bytes[index],),
            )
            library.add(window, piece)


class _ParameterRecorder(Recorder):
    """Records which parameter each event belongs to: the one whose tensors the operation has, or the one before."""

    def __init__(self, storages: StorageWatch, position_of: Mapping[int, int]):
        super().__init__(storages)
        self._position_of = position_of
        self.position = 0
        self.positions: list[int] = [0]  # of the mark at the beginning

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, record it, and note its parameter."""
        tensors = tensors_in(args, kwargs)
        positions = {self._position_of.get(tensor.untyped_storage()._cdata) for tensor in tensors} - {None}
        if len(positions) > 1:
            raise NotRepeatedError
        for position in positions:
            assert position is not None
            self.position = position
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.positions += [self.position] * (self._event - len(self.positions))
        return result


def _cost(joined: Joined) -> OptimizerCost:
    births, deaths, sizes = [], [], []
    try:
        for number, (rows, own) in enumerate(joined.rows("storages")):
            births.append(joined.grid.starts[number, own] + rows[:, 0])
            sizes.append(rows[:, 1])
            deaths.append(joined.events(rows[:, 2:], own))
    except AmbiguousError:
        raise NotRepeatedError from None
    alive: Integers = live_bytes(
        np.concatenate(births), np.concatenate(deaths), np.concatenate(sizes), joined.grid.num_events
    )
    return OptimizerCost(sum(piece.facts[0] for piece in joined.pieces), alive)
