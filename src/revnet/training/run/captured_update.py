"""Updates whose forward and backward pass are one CUDA graph.

Experimental: written, not run on a GPU.

The first updates run as usual, and warm up the libraries. Then the passes are captured, and each later update replays
them on new values of the same tensors. Everything else remains as it is: what a batch goes through before the network,
clipping, the optimizer, the schedule and the metrics. Their kernels are few.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Outputs = tuple[Tensor, ...]
Capture = Callable[[Callable[[], None]], Callable[[], object]]
"""Function that captures a function, and returns a function that replays it."""

NUM_WARMUPS = 3
"""Number of updates before the passes are captured."""


def capture_in_graph(function: Callable[[], None]) -> Callable[[], object]:
    """Capture a function in a CUDA graph, without running its kernels."""
    graph = torch.cuda.CUDAGraph()
    # A thread that loads data may pin memory in the meantime.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class CapturedUpdate:
    """The forward and backward pass of a batch, captured once and replayed for each later batch of its shape.

    Args:
        compute: Function from a batch to the loss, and to other tensors that the caller reads.
        module: The network. Its parameters and buffers must stay in place.
        capture: Captures a function.
    """

    def __init__(self, compute: Callable[[Any], Outputs], module: nn.Module, capture: Capture = capture_in_graph):
        self._compute, self._module, self._capture = compute, module, capture
        self._num_warmups = 0
        self._structure: Any = None
        self._inputs: list[Tensor] = []
        self._outputs: Outputs = ()
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._addresses: list[int] = []
        self._replay: Callable[[], object] | None = None
        self._is_replayed = False

    def run(self, batch: Any) -> Outputs:
        """Return what `compute` returns. A batch of another shape than the first one, such as the last, runs as usual.

        Raises:
            ValueError: The network cannot be captured.
        """
        leaves, structure = tree_flatten(batch)
        self._is_replayed = False
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return self._compute(batch)
        if self._structure is None:
            self._structure = _describe(leaves, structure)
        if self._structure != _describe(leaves, structure):
            return self._compute(batch)
        if self._num_warmups < NUM_WARMUPS:
            self._num_warmups += 1
            return self._compute(batch)
        if self._replay is None or self._addresses != self._current_addresses():
            self._begin(leaves, structure)
        assert self._replay is not None
        for static, leaf in zip(self._inputs, leaves, strict=True):
            static.copy_(leaf)
        self._replay()
        self._is_replayed = True
        return self._outputs

    def put_gradients(self) -> bool:
        """Give the parameters the gradients of the last batch; return False if it was not replayed."""
        if self._is_replayed:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        return self._is_replayed

    def _begin(self, leaves: Sequence[Tensor], structure: Any) -> None:
        # Frees the memory of an earlier graph.
        self._replay, self._outputs, self._gradients = None, (), []
        self._inputs = [leaf.clone() for leaf in leaves]
        batch = tree_unflatten(self._inputs, structure)
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        for parameter in parameters:
            # The graph then writes gradients to memory of its own, and adds to none.
            parameter.grad = None

        def passes() -> None:
            outputs = self._compute(batch)
            # As without a graph, the backward pass runs outside of autocast.
            with torch.autocast(outputs[0].device.type, enabled=False):
                outputs[0].backward()
            self._outputs = tuple([output.detach() for output in outputs])

        # Casts that autocast has cached would not be repeated in a replay.
        torch.clear_autocast_cache()
        before, self._addresses = _host_states(), self._current_addresses()
        try:
            self._replay = self._capture(passes)
        except (NotImplementedError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"`cuda_graphs` (=True): the network cannot be captured in a CUDA graph ({reason}); leave it out."
            ) from error
        finally:
            torch.clear_autocast_cache()
        if not _are_equal(before, _host_states()):
            raise ValueError(
                "`cuda_graphs` (=True) does not go with a network that draws random numbers on the CPU, which a CUDA "
                "graph would repeat in every update; draw them on the GPU, or leave it out."
            )
        if self._addresses != self._current_addresses():
            raise ValueError(
                "`cuda_graphs` (=True) does not go with a network that replaces a buffer by another tensor, which a "
                "CUDA graph would not do again; write to the buffer in place, or leave it out."
            )
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]

    def _current_addresses(self) -> list[int]:
        tensors: Iterable[Tensor] = (*self._module.parameters(), *self._module.buffers())
        return list(map(Tensor.data_ptr, tensors))


def _describe(leaves: Sequence[Tensor], structure: Any) -> Any:
    return structure, [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves]


def _host_states() -> tuple[Any, ...]:
    """Return the states of the generators on the CPU: PyTorch's, Python's and NumPy's."""
    return torch.default_generator.get_state(), random.getstate(), np.random.get_state()


def _are_equal(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    numpy_before, numpy_after = before[2], after[2]
    return (
        torch.equal(before[0], after[0])
        and before[1] == after[1]
        and np.array_equal(numpy_before[1], numpy_after[1])
        and numpy_before[2:] == numpy_after[2:]
    )
