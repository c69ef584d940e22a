"""Predict the step of one process of several, on fake tensors."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map_only

from revnet._torch_internals import FakeTensorMode
from revnet.errors import PredictionError
from revnet.memory.distributed._equal_blocks import EqualBlocks, copy_to_meta
from revnet.memory.distributed._fake_processes import fake_processes
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.distributed._process_step import ProcessStep, run_process_step
from revnet.memory.distributed._replica import Replica
from revnet.memory.distributed._splice import NotPeriodicError, is_same, spliced
from revnet.memory.step._cpu_kernels import CpuKernels
from revnet.memory.step._fake import TensorFaker, fake_tensors_in
from revnet.memory.step._optimizer import AnyValue, OptimizerFactory, make_optimizer
from revnet.memory.step._predict import describe_inputs, first_line, quiet, values_needed
from revnet.memory.step._run_step import Loss, tensors_in

_SHORT = 3
"""Number of blocks to which a run of equal blocks is shortened, since the first and the last differ from the others."""


@dataclass(frozen=True, eq=False)
class ProcessProgram:
    """The training step that each of several processes runs on its part of the batch."""

    model: nn.Module
    args: tuple[Any, ...]
    """Positional arguments of the model in one process."""
    kwargs: dict[str, Any]
    optimizer: OptimizerFactory | None
    loss: Loss | None
    autocast: torch.dtype | None
    num_processes: int
    rank: int


def predict_replicated(program: ProcessProgram) -> ProcessStep:
    """Return the step of a process under `DistributedDataParallel`."""
    faker = TensorFaker(torch.device("cpu"), None)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with _imaginary(program), fakes, fake_tensors_in(program.model, faker), _counting() as log:
        # The first step finds the order of the gradients, and the second forms the buckets.
        return _run(program, log, Replica(program.model), faker, num_warm_up=2)


def predict_sharded(program: ProcessProgram, shard: Callable[..., None], runs: Sequence[EqualBlocks]) -> ProcessStep:
    """Return the step of a process under `fully_shard`.

    Args:
        program: The step.
        shard: Function that shards a model on the meta device over a `mesh`.
        runs: Runs of equal blocks, of which a few blocks suffice.

    Raises:
        NotPeriodicError: The blocks of a run need different bytes after all.
    """

    def predict(lengths: Sequence[int]) -> ProcessStep:
        with _imaginary(program):
            model = copy_to_meta(program.model, runs, lengths)
            # Outside the fake mode, because `fully_shard` makes a tensor for each parameter and process.
            shard(model, mesh=init_device_mesh("cpu", (program.num_processes,)))
            with FakeTensorMode(allow_non_fake_inputs=True), _counting() as log:
                model.to_empty(device="cpu")
                return _run(program, log, model, TensorFaker(torch.device("cpu"), None), num_warm_up=1)

    if not runs:
        return predict(())
    short = [_SHORT] * len(runs)
    base = predict(short)
    longer = [predict([_SHORT + (index == other) for other in range(len(runs))]) for index in range(len(runs))]
    if not is_same(spliced(base, longer, [2] * len(runs)), predict([_SHORT + 2] * len(runs))):
        raise NotPeriodicError
    return spliced(base, longer, [len(run) - _SHORT for run in runs])


def _run(
    program: ProcessProgram, log: ProcessLog, model: nn.Module, faker: TensorFaker, *, num_warm_up: int
) -> ProcessStep:
    args, kwargs = tree_map_only(Tensor, faker.fake, (program.args, program.kwargs))
    optimizer = None
    if program.optimizer is not None:
        optimizer = make_optimizer(program.optimizer, list(model.parameters()))
    return run_process_step(
        log,
        model,
        args,
        kwargs,
        optimizer=optimizer,
        loss=program.loss,
        autocast=program.autocast,
        num_warm_up=num_warm_up,
    )


@contextmanager
def _counting() -> Iterator[ProcessLog]:
    """Count the operations on fake tensors of the CPU."""
    with CpuKernels(), AnyValue(), ProcessLog() as log:
        yield log


@contextmanager
def _imaginary(program: ProcessProgram) -> Iterator[None]:
    """Play the part of one process of the program, and explain errors in one line."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(quiet())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Warnings are for those who train.
        stack.enter_context(fake_processes(program.num_processes, program.rank))
        stack.enter_context(_explained(program))
        yield


@contextmanager
def _explained(program: ProcessProgram) -> Iterator[None]:
    try:
        yield
    except PredictionError:
        raise
    except Exception as error:
        where = f"the step of {type(program.model).__name__} on {program.num_processes} devices"
        cause = values_needed(error)
        if cause is None:
            given = describe_inputs(tensors_in(program.args, program.kwargs))
            raise PredictionError(f"{where} failed, {given} per device: {first_line(error)}") from error
        raise PredictionError(
            f"{where} cannot be predicted, because {cause}; measure it with `revnet.memory.measure`, on one device."
        ) from error
