"""Check whether a function returns the same bits when it runs again, as reconstruction assumes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from revnet.engine._record import RecordedCall
from revnet.engine._restore import set_aside
from revnet.engine._surroundings import Surroundings
from revnet.engine._tensors import storage_key, tensors_in


class Repetition(NamedTuple):
    """Relative errors of repeated runs of a function, compared with its first run; 0 if every bit was equal."""

    output_error: float
    gradient_error: float
    """Largest error over the gradients of its inputs and its parameters."""


def repeat_function(
    function: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], num_runs: int = 3
) -> Repetition:
    """Run `function` forward and backward several times under the same conditions, without side effects.

    Args:
        function: A residual function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        num_runs: The number of runs. A race between threads may need many runs to show.
    """
    surroundings = Surroundings.of(None, tensors_in(args, kwargs))
    # Never recorded: it lists the buffers and devices that `set_aside` protects.
    call = RecordedCall(function._get_name(), None, function, surroundings)
    first: tuple[list[Tensor], list[Tensor]] | None = None
    errors = [0.0, 0.0]
    for _ in range(num_runs):
        with torch.enable_grad(), set_aside(call):
            results = _run(function, args, kwargs)
        if first is None:
            first = results
        for kind in (0, 1):
            differences = [_difference(a, b) for a, b in zip(results[kind], first[kind], strict=True)]
            errors[kind] = max([errors[kind], *differences])
    return Repetition(*errors)


def _run(function: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs, and the gradients of everything that requires one."""
    args, kwargs = tree_map_only(Tensor, _leaf, (args, kwargs))
    outputs = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
    wanted = [tensor for tensor in (*tensors_in(args, kwargs), *function.parameters()) if tensor.requires_grad]
    # Not constant, because sums of gradients would often cancel to the same bits in any order.
    seeds = [(output, _ramp(output)) for output in outputs if output.requires_grad]
    if not seeds or not wanted:
        return [output.detach() for output in outputs], []
    gradients = torch.autograd.grad(
        [output for output, _ in seeds], wanted, [seed for _, seed in seeds], allow_unused=True
    )
    return [output.detach() for output in outputs], [gradient for gradient in gradients if gradient is not None]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _ramp(like: Tensor) -> Tensor:
    ramp = torch.linspace(-1, 1, max(like.numel(), 1), device=like.device)[: like.numel()]
    return ramp.view(like.shape).to(like.dtype)


def _difference(tensor: Tensor, first: Tensor) -> float:
    """Return the relative error; 0 if all bits are equal, with NaN in the same places."""
    if storage_key(tensor) == storage_key(first) or torch.equal(tensor, first):
        return 0.0
    both_nan = tensor.isnan() & first.isnan()
    # In float32 at least, because the norm of a float16 tensor overflows.
    tensor, first = (
        value.masked_fill(both_nan, 0).to(torch.promote_types(value.dtype, torch.float32)) for value in (tensor, first)
    )
    if torch.equal(tensor, first):
        return 0.0
    error = torch.linalg.vector_norm(tensor - first) / torch.linalg.vector_norm(first).clamp_min(1e-30)
    # NaN remains where only one of the runs has NaN or inf.
    return float(error.nan_to_num(nan=torch.inf))
