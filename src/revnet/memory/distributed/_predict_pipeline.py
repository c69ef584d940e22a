"""Predict the memory of the stages of a reversible pipeline."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from revnet._torch_internals import FakeTensorMode
from revnet._units import counted
from revnet.distributed.pipeline._cut import even_counts
from revnet.distributed.pipeline._link import Header
from revnet.distributed.pipeline._stage_module import StageModule
from revnet.memory.distributed._device_memory import Communication, DeviceMemory
from revnet.memory.distributed._model_parts import ModelParts, refusal, take_apart
from revnet.memory.distributed._predict_process import ProcessProgram, counting, predicting
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.distributed._process_step import ProcessStep, run_process_step
from revnet.memory.distributed._splice import NotPeriodicError, extrapolated
from revnet.memory.distributed._stage_step import StageStep
from revnet.memory.distributed._summary import device_memory
from revnet.memory.repeats._block_kinds import kinds_of_blocks
from revnet.memory.step._fake import TensorFaker, fake_tensors_in
from revnet.memory.step._optimizer import AnyValue, make_optimizer
from revnet.nn import AbstractReversibleBlock, ReversibleSequential

_FEW_AHEAD = 2
"""Number of microbatches that a stage runs ahead of its backward passes, where the true number is larger."""
_STEADY = 3
"""Number of microbatches that it runs after these. More would repeat the same bytes."""


@dataclass(frozen=True)
class PipelineMemory:
    """Figures of all stages."""

    stages: tuple[DeviceMemory, ...]
    communication: tuple[Communication, ...]
    model_bytes: int
    is_extrapolated: bool


def predict_pipeline(program: ProcessProgram, num_microbatches: int) -> PipelineMemory:
    """Return the figures of the stages of a pipeline, into which the blocks are divided evenly.

    Raises:
        ValueError: The model cannot be cut into this many stages.
    """
    faker = TensorFaker(torch.device("cpu"), None)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with predicting(program), fakes, fake_tensors_in(program.model, faker, values=program.others):
        (batch,) = map(faker.fake, program.args)
        prediction = _PipelinePrediction(program, batch, num_microbatches)
        return prediction.figures()


class _PipelinePrediction:
    """Predicts the stages of a pipeline. Equal stages are predicted once."""

    def __init__(self, program: ProcessProgram, batch: Tensor, num_microbatches: int):
        self._program, self._batch = program, batch
        self._microbatches = batch.split(len(batch) // num_microbatches)
        self._log: ProcessLog | None = None
        self._parts: ModelParts = take_apart(program.model, self._microbatches[0], self._pause)
        blocks = self._parts.blocks
        self._kinds = list(zip(kinds_of_blocks(program.model, blocks), blocks.policies, strict=True))
        self._headers: dict[object, Header] = {}
        self._steps: dict[tuple[object, ...], ProcessStep] = {}
        self._is_extrapolated = False

    def figures(self) -> PipelineMemory:
        """Return the figures of all stages."""
        num_stages, num_blocks = self._program.num_processes, len(self._parts.blocks)
        if num_blocks < num_stages:
            raise refusal(self._program.model, f"has {counted(num_blocks, 'block')}, fewer than {num_stages} stages")
        stages, first, model_bytes = [], 0, 0
        owners: dict[int, int] = {}
        last_blocks: list[int] = []
        for rank, count in enumerate(even_counts(num_blocks, num_stages)):
            self._check_not_tied(rank, range(first, first + count), owners)
            step = self._predict(rank, range(first, first + count))
            stages.append(device_memory(step, f"stage {rank}"))
            model_bytes += step.whole_parameter_bytes
            first += count
            last_blocks.append(first - 1)
        communication = self._communication(last_blocks[:-1])
        return PipelineMemory(tuple(stages), communication, model_bytes, self._is_extrapolated)

    def _check_not_tied(self, rank: int, blocks: Sequence[int], owners: dict[int, int]) -> None:
        """Raise if blocks share a parameter with an earlier stage. `owners` has the stage of each tensor, by its id."""
        for block in blocks:
            for tensor in self._parts.blocks[block].state_dict(keep_vars=True).values():
                if owners.setdefault(id(tensor), rank) != rank:
                    raise refusal(
                        self._program.model, f"shares parameters between stages {owners[id(tensor)]} and {rank}"
                    )

    def _predict(self, rank: int, blocks: Sequence[int]) -> ProcessStep:
        """Return the step of a stage with these blocks."""
        ahead = self._program.num_processes - 1 - rank
        num_steady = min(_STEADY, len(self._microbatches) - ahead)
        if ahead >= _FEW_AHEAD + 3:
            try:
                step = extrapolated(
                    lambda sizes: self._run_once(rank, blocks, sizes[0], num_steady), [ahead], [_FEW_AHEAD]
                )
            except NotPeriodicError:
                pass
            else:
                self._is_extrapolated = True
                return step
        return self._run_once(rank, blocks, ahead, num_steady)

    def _run_once(self, rank: int, blocks: Sequence[int], ahead: int, num_steady: int) -> ProcessStep:
        """Return the step of a stage. Stages of equal blocks share it."""
        is_first, is_last = rank == 0, rank == self._program.num_processes - 1
        before = None if is_first else self._kinds[blocks[0] - 1]
        key = is_first, is_last, ahead, num_steady, before, *(self._kinds[block] for block in blocks)
        if key not in self._steps:
            self._steps[key] = self._run(rank, blocks, ahead, num_steady)
        return self._steps[key]

    def _run(self, rank: int, blocks: Sequence[int], ahead: int, num_steady: int) -> ProcessStep:
        is_first, is_last = rank == 0, rank == self._program.num_processes - 1
        whole, factory = self._parts.blocks, self._program.optimizer
        sequence = ReversibleSequential(
            *[cast("AbstractReversibleBlock", whole[block]) for block in blocks],
            policy=[whole.policies[block] for block in blocks],
            tolerance=whole.tolerance,
        )
        num_stages = self._program.num_processes
        stage = StageModule(
            sequence,
            stem=self._parts.stem if is_first else None,
            head=self._parts.head if is_last else None,
            index=rank,
            num_stages=num_stages,
            # Only whether there are half-blocks above matters here.
            num_above=num_stages - 1 - rank,
        )
        parameters = list(stage.parameters())
        incoming = None if is_first else self._header_after(blocks[0] - 1)
        outgoing = None if is_last else self._header_after(blocks[-1])
        with counting(self._program) as log:
            self._log = log
            optimizer = None if factory is None or not parameters else make_optimizer(factory, parameters)
            step = StageStep(
                log=log,
                stage=stage,
                microbatches=self._microbatches[: ahead + num_steady],
                incoming=incoming,
                outgoing=outgoing,
                num_ahead=ahead,
                loss=self._program.loss,
                autocast=self._program.autocast,
            )
            inputs = [self._batch] if is_first else []
            return run_process_step(
                log, stage, inputs, step.run, optimizer=optimizer, optimizer_mode=AnyValue(), num_warm_up=1
            )

    def _header_after(self, block: int) -> Header:
        """Return the description of the streams that a stage sends whose last block is this one."""
        kind = self._kinds[block]
        if kind not in self._headers:
            with torch.enable_grad():
                streams, recording = self._parts.blocks[block : block + 1].record(self._parts.activation)
            self._headers[kind] = Header.of(
                streams,
                recording.input_dtype,
                is_joined=isinstance(self._parts.activation, Tensor),
                needs_output=recording.needs_output,
                num_microbatches=len(self._microbatches),
            )
        return self._headers[kind]

    def _communication(self, last_blocks: Sequence[int]) -> tuple[Communication, ...]:
        """Return what two neighbors send each other, for the two that send most."""
        if not last_blocks:
            return ()
        header = max(map(self._header_after, last_blocks), key=lambda header: header.needs_output)
        streams = header.new_streams(torch.device("meta"))
        count = len(self._microbatches)
        num_bytes = sum(stream.nbytes for stream in streams)
        # The output comes back together with its gradients, if the stage needs it.
        copies = 2 if header.needs_output else 1
        return (
            Communication("forward", "to the next stage", count * len(streams), count * num_bytes),
            Communication("backward", "to the stage before", copies * count * len(streams), copies * count * num_bytes),
        )

    def _pause(self) -> AbstractContextManager[None]:
        return nullcontext() if self._log is None else self._log.pause()
