"""Take a model apart for a pipeline: what runs before its reversible blocks, the blocks, and what runs after them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revnet._torch_internals import TorchDispatchMode
from revnet.memory.step._run_step import tensors_in
from revnet.nn import ReversibleSequential


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The parts of a model that a pipeline runs one after the other."""

    stem: nn.Module | None
    """Module before the blocks, which takes the input of the model."""
    blocks: ReversibleSequential
    head: nn.Module | None
    """Module after the blocks, which returns the output of the model."""
    activation: Any
    """Input of the blocks: a tensor or a tuple of streams."""


def take_apart(model: nn.Module, x: Tensor, pause: Callable[[], Any]) -> ModelParts:
    """Return the parts of a model, by calling it once without its blocks.

    Stem and head are modules that run the whole model as far as the blocks, and from the blocks on. They have only the
    parameters that these parts use.

    Args:
        model: The model, with fake tensors.
        x: Input of the model.
        pause: Returns a context in which operations are not counted. The head runs the stem in it.

    Raises:
        ValueError: The model has no reversible sequence or several, or it cannot be divided.
    """
    blocks = _only_sequence(model)
    activations: list[Any] = []

    def skip(activation: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            raise refusal(model, "passes more than one argument to its blocks")
        activations.append(activation)
        use.begin_second_part()
        return activation

    with torch.no_grad(), _Use() as use, _replacing(blocks, skip):
        output = model(x)
    if len(activations) != 1:
        raise refusal(model, f"calls its blocks {len(activations)} times")
    (activation,) = activations
    if use.created & use.second - _storages_in(activation):
        raise refusal(model, "uses activations from before its blocks after them, too")
    before, after = _tensors_outside(model, blocks, use)

    def stem(value: Tensor) -> Any:
        try:
            with _replacing(blocks, _stop):
                model(value)
        except _ReachedError as reached:
            return reached.activation
        raise AssertionError

    def head(activation: Any) -> Any:
        def resume(_: Any) -> Any:
            paused.close()
            return activation

        with ExitStack() as paused, _replacing(blocks, resume):
            paused.enter_context(pause())
            return model(x)

    return ModelParts(
        stem=None if activation is x else _Part(stem, before),
        blocks=blocks,
        head=None if output is activation else _Part(head, after),
        activation=activation,
    )


def refusal(model: nn.Module, reason: str) -> ValueError:
    """Return the error for a model that cannot run as a pipeline."""
    return ValueError(
        f"`model` (={type(model).__name__}) {reason}, so it cannot run as a pipeline; use the strategy fsdp2 instead."
    )


def _tensors_outside(model: nn.Module, blocks: nn.Module, use: "_Use") -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters and buffers of the stem, with unused ones, and of the head."""
    own = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
    before: list[Tensor] = []
    after: list[Tensor] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        storage = tensor.untyped_storage()._cdata
        num_uses = (storage in use.first) + (storage in use.second) + (id(tensor) in own)
        if num_uses > 1:
            raise refusal(model, f"uses `{name}` in two of its parts, which may be in different stages")
        if id(tensor) not in own:
            (after if storage in use.second else before).append(tensor)
    return before, after


def _only_sequence(model: nn.Module) -> ReversibleSequential:
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    if len(sequences) != 1:
        raise refusal(model, f"has {len(sequences)} reversible sequences instead of one")
    return sequences[0]


class _Part(nn.Module):
    """Part of a model, with the parameters and buffers that it uses."""

    def __init__(self, run: Callable[[Any], Any], tensors: list[Tensor]):
        super().__init__()
        for index, tensor in enumerate(tensors):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"parameter{index}", tensor)
            else:
                self.register_buffer(f"buffer{index}", tensor)
        self._run = run

    def forward(self, x: Any) -> Any:
        return self._run(x)


class _ReachedError(Exception):
    """The call of a model has reached its blocks."""

    def __init__(self, activation: Any):
        super().__init__()
        self.activation = activation


def _stop(activation: Any) -> Any:
    raise _ReachedError(activation)


@contextmanager
def _replacing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call another function instead of a module."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


class _Use(TorchDispatchMode):
    """Collects the storages that operations use, in the first part and in the second part of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first: set[int] = set()
        self.second: set[int] = set()
        self.created: set[int] = set()
        """Storages of the results of the first part."""
        self._kept: list[Tensor] = []
        self._is_second = False

    def begin_second_part(self) -> None:
        """Count what follows for the second part."""
        self._is_second = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note its operands."""
        result = func(*args, **(kwargs or {}))
        operands = _storages_in(args, kwargs)
        if self._is_second:
            self.second |= operands
        else:
            self.first |= operands
            self.created |= _storages_in(result) - operands
            self._kept += tensors_in(result)  # so that no other storage gets the address
        return result


def _storages_in(*values: Any) -> set[int]:
    """Return the addresses of the storages of the tensors in nested structures."""
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(*values)}
