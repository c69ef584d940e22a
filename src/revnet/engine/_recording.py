"""Forward passes whose streams the caller keeps or sends elsewhere, and hands back for the backward pass.

In a pipeline, a stage needs its output only until the next stage has received it. `record` runs chains and returns
their output without holding it. `Recording.backward` takes the output back, together with its gradients. It walks the
streams all the way to the input, and returns the input with its gradients, for the stage before.

References:
    Rivaud et al. (2025), PETRA: Parallel End-to-end Training with Reversible Architectures.
"""

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revnet._checks import describe, is_integer
from revnet._types import Streams
from revnet.engine._agreement import AgreementWatch
from revnet.engine._backward_root import BackwardEntry, BackwardRoot
from revnet.engine._chain import BoundChain
from revnet.engine._digest import digest_of
from revnet.engine._drift import DriftWatch
from revnet.engine._rebuild import Rebuilder
from revnet.engine._streams import StreamSnapshot
from revnet.engine._tracing import refuse, runs_plainly
from revnet.errors import ReconstructionError

Segment = tuple[Callable[[BoundChain, Sequence[Tensor]], Streams], BoundChain]
"""The `run` method of a policy, and the chain that it runs."""

FOREIGN_ABOVE = 0.5
"""Relative error above which streams that come back cannot be the output of the pass, even amplified by rounding."""


def record(
    segments: Sequence[Segment], streams: Sequence[Tensor], *, needs_input: bool = True
) -> tuple[Streams, "Recording"]:
    """Run chains one after the other, and return the streams and the recording of the pass, which holds no output.

    If the streams require gradients, the backward pass continues into their graph.

    Args:
        segments: The chains with the `run` methods of their policies, at least one. Only the output of the last chain
            is not held, if it is reversed without a tolerance. The output of any other chain is held as usual.
        streams: The streams, two or more. Not modified.
        needs_input: Whether `Recording.backward` must return the input.

    Raises:
        NotImplementedError: The call is traced, by `torch.compile` or an exporter.
    """
    if torch.compiler.is_dynamo_compiling() or runs_plainly():
        refuse(
            "`record` cannot be compiled or exported; call it in eager mode, and compile the residual functions: "
            "`block.compile()`."
        )
    if not torch.is_grad_enabled():
        running = tuple(streams)
        for policy_run, chain in segments:
            running = policy_run(chain, running)
        return running, Recording(running)
    entry = BackwardEntry()
    before = BackwardRoot(streams) if any(stream.requires_grad for stream in streams) else None
    inputs = [stream.detach() for stream in streams]
    del streams
    running = entry.enter(inputs)
    runs: list[RecordedRun | None] = []
    for index, (policy_run, chain) in enumerate(segments):
        is_last = index == len(segments) - 1
        is_free = chain.tolerance is None or chain.chain.is_exact
        recorder = ChainRecorder(undoes_all=needs_input and not runs, releases=is_last and is_free)
        chain.recorder = recorder
        running = policy_run(chain, running)
        # The run refers to the chain, and nothing that a run refers to may refer to it (rule 1).
        chain.recorder = None
        runs.append(recorder.taken(running, chain))
    output = tuple([stream.detach() for stream in running])
    recording = Recording(output)
    recording.keep(BackwardRoot(running), entry, before, runs[-1])
    if needs_input:
        recording.keep_input(runs[0], inputs)
    return output, recording


class Recording:
    """One forward pass of `record`. It holds no output, unless the policy of the last block or a tolerance needs it.

    Its method `backward` is called once.

    Args:
        output: The output of the pass. It is not kept.
    """

    def __init__(self, output: Streams):
        self._metas = [(stream.shape, stream.dtype, stream.device) for stream in output]
        self._root: BackwardRoot | None = None
        self._entry: BackwardEntry | None = None
        self._before: BackwardRoot | None = None
        self._first: RecordedRun | None = None
        self._released: RecordedRun | None = None
        self._inputs: list[Tensor] | None = None
        self._is_used = False
        self.needs_output = False
        """Whether `backward` needs the output back. Otherwise the recording holds what it needs."""
        self.input_dtype: torch.dtype | None = None
        """Dtype in which residual functions read the streams, if it differs from the dtype of the streams."""

    def keep(
        self, root: BackwardRoot, entry: BackwardEntry, before: BackwardRoot | None, last: "RecordedRun | None"
    ) -> None:
        """Keep the ends of the graph, the end of the graph before it, and the run of the last chain."""
        self._root, self._entry, self._before = root, entry, before
        self._released = last if last is not None and last.is_released else None
        self.needs_output = self._released is not None

    def keep_input(self, first: "RecordedRun | None", inputs: list[Tensor]) -> None:
        """Keep the run that can rebuild the input, or the input itself if there is none."""
        self._first = first
        self._inputs = inputs if first is None else None

    def backward(
        self, streams: Sequence[Tensor] | None, grads: Sequence[Tensor | None], *, distance: int = 0
    ) -> tuple[Streams | None, list[Tensor | None]]:
        """Run the backward pass, and return the input and its gradients. Gradients of parameters accumulate.

        If the input of the pass required a gradient, the backward pass continues into its graph.

        Args:
            streams: The output of the pass. None if `needs_output` is false. A list is emptied, so that the memory of
                each stream is used for the streams before it.
            grads: The gradients of the output; None where there is none. A list is emptied, too.
            distance: The number of half-blocks that have been undone to rebuild `streams`; 0 if they are the tensors
                that the forward pass returned.

        Returns:
            The streams at the beginning, or None if they are not needed, and their gradients.

        Raises:
            ReconstructionError: `streams` are not the output of this pass, or cannot be undone.
            RuntimeError: It is the second call, or gradients were disabled in the forward pass.
            TypeError: `streams` is missing, or one of the arguments has the wrong kind.
            ValueError: One of the arguments has the wrong number of tensors, shape, dtype or device.
        """
        if self._is_used:
            raise RuntimeError(
                "`Recording.backward` was called a second time, but the first call freed the pass; record it again."
            )
        if self._root is None or self._entry is None:
            raise RuntimeError(
                "`Recording.backward` needs a pass with gradients, but `torch.no_grad()` or `torch.inference_mode()` "
                "was on when it was recorded; record it outside."
            )
        if not is_integer(distance) or distance < 0:
            raise ValueError(f"`distance` (={describe(distance)}) must be an integer from 0 up.")
        _check("grads", grads, self._metas, may_be_none=True)
        if self._released is not None:
            _check("streams", streams, self._metas)
            assert streams is not None
            held = [stream.detach() for stream in streams]
            if isinstance(streams, list):
                streams.clear()
            self._released.take_back(held, distance)
            del held
        self._is_used = True
        self._root.backward(grads)
        inputs = self._inputs if self._first is None else self._first.take_input()
        input_grads = self._entry.take_grads(len(self._metas))
        # The graph refers to the run, and the run to what it has kept.
        self._root = self._entry = self._first = self._released = self._inputs = None
        before, self._before = self._before, None
        if before is not None:
            before.backward(tuple(input_grads))
        return None if inputs is None else tuple(inputs), input_grads


class ChainRecorder:
    """Runs one chain for `record`, if its policy is one that rebuilds activations."""

    def __init__(self, *, undoes_all: bool, releases: bool):
        self._undoes_all, self._releases = undoes_all, releases
        self._run: RecordedRun | None = None
        self._final: Streams = ()

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the chain; `reversible` calls this instead of its own run."""
        chain.recorder = None
        self._run = RecordedRun(chain, streams, undoes_all=self._undoes_all, releases=self._releases)
        self._final = self._run.run(chain, streams)
        return self._final

    def taken(self, streams: Streams, chain: BoundChain) -> "RecordedRun | None":
        """Return the run, or None if the policy has not used it."""
        run, final = self._run, self._final
        self._run, self._final = None, ()
        if run is not None and not (len(final) == len(streams) and all(map(operator.is_, final, streams))):
            raise NotImplementedError(
                f"the policy of `{chain.half_blocks[0].name}` changes the streams after it has run the blocks, so "
                "`record` cannot undo them; return the streams of `Reverse().run(chain, streams)` as they are."
            )
        return run


class RecordedRun(Rebuilder):
    """A run that can be undone to the beginning of its chain, and need not hold its final streams in between."""

    def __init__(self, chain: BoundChain, streams: Sequence[Tensor], *, undoes_all: bool, releases: bool):
        super().__init__(chain, streams)
        self.undoes_all = undoes_all
        self.is_released = releases

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the chain, and hold the final streams only if the run is not released."""
        chain.is_joined = self.is_released  # Then the final streams are not held yet.
        final = super().run(chain, streams)
        self._strides = [stream.stride() for stream in final]
        if not self.is_released:
            if self.held is None or self.undoes_all:
                self._hold_all(final)
            return final
        # Drift is measured against the true output, not against what comes back.
        self._hold_all(final)
        for observer in self.observers:
            if isinstance(observer, DriftWatch):
                observer.before_rebuild(self)
        self.held = None
        return final

    def _hold_all(self, streams: Sequence[Tensor]) -> None:
        self.held = StreamSnapshot(len(self.steps), [stream.detach() for stream in streams], self._strides)
        self.is_finished = True

    def take_back(self, streams: Sequence[Tensor], distance: int) -> None:
        """Hold the final streams, which have come back after `distance` half-blocks above were undone."""
        self.held = StreamSnapshot(len(self.steps), list(streams), self._strides)
        self.held.origin += distance
        if distance:
            # `rebuild` looks only if the streams are exact.
            self.surroundings.look_at_random_states(self.steps[0].before)
        for observer in self.observers:
            if isinstance(observer, AgreementWatch):
                _compare(observer, self, self.held)

    def rebuild(self, index: int) -> None:
        """Fill the slots of half-block `index`.

        Raises:
            ReconstructionError: The final streams have not come back.
        """
        if self.held is None and self.is_finished:
            raise ReconstructionError(
                f"the activations of `{self.steps[index].half_block.name}` cannot be rebuilt, because `record` does "
                "not hold the output of the pass; call `Recording.backward` with the output instead of another "
                "backward pass."
            )
        super().rebuild(index)

    def take_input(self) -> list[Tensor]:
        """Undo the half-blocks that the backward pass did not need, and return the streams before the first one."""
        assert self.held is not None
        held, self.held = self.held, None
        if held.position == len(self.steps):
            self.surroundings.look_at_random_states(self.steps[0].before)
        with torch.no_grad():
            while held.position > 0:
                self.steps[held.position - 1].undo(self, held, fill=False)
        return [held.read(number) for number in range(len(held.held))]


def _compare(watch: AgreementWatch, run: RecordedRun, streams: StreamSnapshot) -> None:
    """Compare streams that have come back with the true ones, and begin the walk with their errors.

    Raises:
        ReconstructionError: They are not the output of this pass.
    """
    watch.sizes, watch.errors = [0.0] * len(streams.strides), [0.0] * len(streams.strides)
    watch.worst, watch.position = 0.0, len(run.steps)
    for number, expected in watch.final.items():
        digest, size = digest_of(streams.read(number)), math.hypot(*expected)
        if digest == expected or not math.isfinite(size):  # The model produced NaN or inf.
            continue
        watch.sizes[number], watch.errors[number] = size, (error := math.dist(digest, expected))
        watch.worst = max(watch.worst, error / (size or math.inf))
        is_exact = run.chain.chain.is_exact
        # Relative to all streams: rounding of another one must not count where this one is nearly zero.
        largest = max(math.hypot(*of_stream) for of_stream in watch.final.values())
        if is_exact or not error <= FOREIGN_ABOVE * largest:
            raise ReconstructionError(
                f"`streams` differ from the output of this pass by {error / (largest or math.inf):.1g}, relative to "
                f"it, although {'the coupling is exact' if is_exact else 'rounding explains much less'}; pass the "
                "output of the same forward pass to `Recording.backward`."
            )


def _check(
    name: str,
    tensors: object,
    metas: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
    *,
    may_be_none: bool = False,
) -> None:
    """Raise unless the tensors have the shapes, dtypes and devices of the output."""
    if not isinstance(tensors, list | tuple):
        raise TypeError(
            f"`{name}` (={type(tensors).__name__}) must be a list or a tuple with one tensor for each stream."
        )
    if len(tensors) != len(metas):
        raise ValueError(f"`{name}` (of length {len(tensors)}) must have one tensor for each of {len(metas)} streams.")
    for index, (tensor, meta) in enumerate(zip(tensors, metas, strict=True)):
        if tensor is None and may_be_none:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}[{index}]` (={type(tensor).__name__}) must be a tensor.")
        if (tensor.shape, tensor.dtype, tensor.device) != meta:
            raise ValueError(
                f"`{name}[{index}]` is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, but the output is "
                f"{tuple(meta[0])} {meta[1]} on {meta[2]}; pass the output of the same forward pass, and gradients of "
                "its shape."
            )
