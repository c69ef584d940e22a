"""Predict the step of one process of several, on fake tensors."""

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map_only

from revnet._model_output import explain_no_gradient
from revnet._torch_internals import FakeTensorMode
from revnet._torch_release import unseen_sharding_trials
from revnet.errors import PredictionError
from revnet.memory.distributed._equal_blocks import EqualBlocks, copy_to_meta
from revnet.memory.distributed._fake_processes import fake_processes
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.distributed._process_step import Passes, ProcessStep, run_process_step
from revnet.memory.distributed._replica import Replica
from revnet.memory.distributed._splice import extrapolated
from revnet.memory.step._cpu_kernels import CpuKernels
from revnet.memory.step._fake import TensorFaker, fake_tensors_in
from revnet.memory.step._kept_fakes import KeptFakes
from revnet.memory.step._optimizer import AnyValue, OptimizerFactory, make_optimizer
from revnet.memory.step._predict import describe_inputs, first_line, input_hint, quiet, values_needed
from revnet.memory.step._run_step import Loss, check_losses, losses_of, objects_in, tensors_in

SHORT = 3
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
    kept: KeptFakes
    """Watches the tensors that remain after a step."""

    @property
    def others(self) -> list[Any]:
        """What the step uses and may change, apart from the model."""
        return [self.loss, *objects_in(self.args, self.kwargs)]


def predict_replicated(program: ProcessProgram) -> ProcessStep:
    """Return the step of a process under `DistributedDataParallel`."""
    faker = TensorFaker(torch.device("cpu"), None)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = fake_tensors_in(program.model, faker, values=program.others)
    with (
        predicting(program),
        _processes(program),
        fakes,
        tensors,
        counting(program) as log,
        closing(Replica(program.model)) as replica,
    ):
        # The first step finds the order of the gradients, and the second forms the buckets.
        return _run(program, log, replica, faker, num_warm_up=2)


def predict_sharded(program: ProcessProgram, shard: Callable[..., object], runs: Sequence[EqualBlocks]) -> ProcessStep:
    """Return the step of a process under `fully_shard`.

    Args:
        program: The step.
        shard: Function that shards a model on the meta device over a `mesh`.
        runs: Runs of equal blocks, of which a few blocks suffice.

    Raises:
        NotPeriodicError: The blocks of a run need different bytes after all.
    """

    def predict(lengths: Sequence[int]) -> ProcessStep:
        with predicting(program), _processes(program):
            model = copy_to_meta(program.model, runs, lengths)
            # Outside the fake mode, because `fully_shard` makes a tensor for each parameter and process.
            shard(model, mesh=init_device_mesh("cpu", (program.num_processes,)))
            faker = TensorFaker(torch.device("cpu"), None)
            with FakeTensorMode(allow_non_fake_inputs=True), counting(program) as log:
                model.to_empty(device="cpu")
                # The list holds the model, whose tensors that are not registered are still on the meta device.
                with fake_tensors_in(None, faker, values=(*program.others, [model])):
                    return _run(program, log, model, faker, num_warm_up=1)

    return extrapolated(predict, list(map(len, runs)), [SHORT] * len(runs)) if runs else predict(())


def _run(
    program: ProcessProgram, log: ProcessLog, model: nn.Module, faker: TensorFaker, *, num_warm_up: int
) -> ProcessStep:
    args, kwargs = tree_map_only(Tensor, faker.fake, (program.args, program.kwargs))
    optimizer = None
    if program.optimizer is not None:
        optimizer = make_optimizer(program.optimizer, list(model.parameters()))
    passes = passes_of(model, args, kwargs, loss=program.loss, autocast=program.autocast)
    inputs = tensors_in(args, kwargs)
    return run_process_step(
        log, model, inputs, passes, optimizer=optimizer, optimizer_mode=AnyValue(), num_warm_up=num_warm_up
    )


def passes_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    loss: Loss | None,
    autocast: torch.dtype | None,
) -> Passes:
    """Return a function that runs the forward pass, the loss and the backward pass of a model."""

    def passes(end_forward: Callable[[], None]) -> None:
        torch.clear_autocast_cache()
        with torch.enable_grad():
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                output = model(*args, **kwargs)
                losses = losses_of(output, loss)
                fault = None if losses else explain_no_gradient(model, output)
                del output  # a training step does not keep it either
            check_losses(model, losses, is_given=loss is not None, fault=fault)
            end_forward()
            torch.autograd.backward(losses)

    return passes


@contextmanager
def counting(program: ProcessProgram) -> Iterator[ProcessLog]:
    """Count the operations on fake tensors of the CPU."""
    with unseen_sharding_trials(), CpuKernels(), ProcessLog() as log:
        yield log
    program.kept.add(log.alive())


@contextmanager
def predicting(program: ProcessProgram) -> Iterator[None]:
    """Run the code of the program in the usual modes of PyTorch, and explain errors in one line."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(quiet())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Warnings are for those who train.
        stack.enter_context(_explained(program))
        yield


def _processes(program: ProcessProgram) -> AbstractContextManager[None]:
    return fake_processes(program.num_processes, program.rank)


def _is_refusal(error: Exception) -> bool:
    """Return whether a prediction has refused an argument, in one line. Other errors come from the user's model."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__"))
    return isinstance(error, ValueError | TypeError) and module.startswith("revnet.memory.")


@contextmanager
def _explained(program: ProcessProgram) -> Iterator[None]:
    try:
        yield
    except PredictionError:
        raise
    except Exception as error:
        if _is_refusal(error):
            raise
        where = f"the step of {type(program.model).__name__} on {program.num_processes} devices"
        cause = values_needed(error)
        if cause is None:
            given = describe_inputs(tensors_in(program.args, program.kwargs))
            reason = f"{first_line(error)}{input_hint(error)}"
            raise PredictionError(f"{where} failed, {given} per device: {reason}") from error
        raise PredictionError(
            f"{where} cannot be predicted, because {cause}; measure it with `revnet.memory.measure`, on one device."
        ) from error
