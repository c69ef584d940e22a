"""What a module computes with besides its input, so that it can run a second time as it ran the first time."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.func import functional_call

from revnet._checks import check_tensor
from revnet._torch_internals import hooks_are_disabled, without_parametrization_cache
from revnet.errors import ReconstructionError


class ModuleState:
    """The submodules, training flags, parameters and buffers of a module."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.tensors: list[Tensor] = []
        """Parameters and buffers, each once even if several names refer to it."""
        self._flags = [(part, part.training) for part in module.modules()]
        self._indices: dict[str, int] = {}
        """Index in `tensors` by name."""
        known: dict[int, int] = {}
        for name, tensor in _named_tensors(module).items():
            if known.setdefault(id(tensor), len(self.tensors)) == len(self.tensors):
                self.tensors.append(tensor)
            self._indices[name] = known[id(tensor)]

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        """Call the module with `tensors` as its parameters and buffers, and with the training flags of this state."""
        named = {name: tensors[index] for name, index in self._indices.items()}
        others = [(part, part.training, flag) for part, flag in self._flags if part.training != flag]
        for part, _, flag in others:
            part.training = flag
        try:
            with without_parametrization_cache():
                return functional_call(self.module, named, (x,), tie_weights=False)
        finally:
            for part, own, _ in others:
                part.training = own

    def check_submodules(self) -> None:
        """Raise if the module has other submodules by now."""
        if [*map(id, self.module.modules())] != [id(part) for part, _ in self._flags]:
            raise ReconstructionError(
                f"`module` (={_name(self.module)}) has other submodules than in the forward pass of `chunked`; replace "
                "submodules after the backward pass, or use `num_chunks=1`."
            )

    def check_same_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Raise if the module has other parameters or buffers than `tensors`."""
        now = _named_tensors(self.module)
        for name, index in self._indices.items():
            if now.get(name) is not tensors[index]:
                raise _writes(self.module, f"replaces its tensor `{name}`")

    @contextmanager
    def no_writes(self, x: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Raise if the code inside writes to the input of the module, a parameter or a buffer."""
        versions = [*map(_version_of, (x, *tensors))]
        yield
        for index, tensor in enumerate((x, *tensors)):
            if _version_of(tensor) != versions[index]:
                names = [name for name, place in self._indices.items() if place == index - 1]
                raise _writes(self.module, f"writes to its tensor `{names[0]}`" if names else "writes to its input")


def check_graph(y: Tensor, known: Sequence[Tensor], module: nn.Module) -> None:
    """Raise if `y` depends on a tensor that requires a gradient and is not one of the `known` ones."""
    check_tensor("module(x)", y)
    if not y.requires_grad:
        return
    leaves = {*map(id, known)}
    ends = {(tensor.grad_fn, tensor.output_nr) for tensor in known if tensor.grad_fn is not None}
    start = get_gradient_edge(y)
    pending: list[tuple[Any, int]] = [(start.node, start.output_nr)]
    visited: set[Any] = set()
    while pending:
        edge = pending.pop()
        node = edge[0]
        if edge in ends or node in visited:
            continue
        visited.add(node)
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in leaves:
            raise NotImplementedError(
                f"`module` (={_name(module)}) uses a tensor of shape {tuple(node.variable.shape)} that requires a "
                "gradient, or a result of it, but finds it neither in its input nor in its parameters and buffers, so "
                "that `chunked` would lose the gradient; make it a part of `x` or a parameter, or use `num_chunks=1`."
            )
        pending += [edge for edge in node.next_functions if edge[0] is not None]


def saves_as_usual() -> AbstractContextManager[Any]:
    """Return a context in which autograd saves tensors without the saved-tensor hooks from outside."""
    if hooks_are_disabled() is not None:
        return nullcontext()
    return saved_tensors_hooks(_itself, _itself)


def refuse_gradients(leaves: Sequence[Tensor]) -> None:
    """Raise if another backward pass reaches `leaves`, from a tensor that a module has kept."""
    for leaf in leaves:
        leaf.register_hook(_refuse)


def _refuse(_: Tensor) -> NoReturn:
    raise ReconstructionError(
        "a tensor that a module computed in the backward pass of `chunked` and kept, for example in an attribute, "
        "cannot be differentiated; read it before the backward pass, or use `num_chunks=1`."
    )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers with all their names, except for names by which a module appears again."""
    named: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        named.update(part.named_parameters(path, recurse=False, remove_duplicate=False))
        named.update(part.named_buffers(path, recurse=False, remove_duplicate=False))
    return named


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _writes(module: nn.Module, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"`module` (={_name(module)}) {what}, which `chunked` would repeat for each chunk and in the backward pass; "
        "call a module that keeps no state, for example after `eval()`, or use `num_chunks=1`."
    )


def _name(module: nn.Module) -> str:
    return type(module).__name__
