"""A replica of a model, as `DistributedDataParallel` runs it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revnet._torch_internals import broadcast_buffers, bucket_assignment
from revnet.errors import PredictionError

_BUCKET_LIMITS = [2**20, 25 * 2**20]
"""Default sizes of the first bucket and of the others, in bytes."""
_BROADCAST_LIMIT = 250 * 2**20


class Replica(nn.Module):
    """Replicate a model as `DistributedDataParallel` does with its defaults, on fake tensors.

    `DistributedDataParallel` reads the values of tensors when it forms its buckets, and fake tensors have none. This
    class has the same buckets: copies of all gradients, in the order in which the backward pass computes them. It calls
    the same collectives.

    Args:
        module: The model, with fake tensors.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._buckets: list[Tensor] = []
        self._bucket_of: dict[int, int] = {}
        self._num_missing: list[int] = []
        self._ready: list[nn.Parameter] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def close(self) -> None:
        """Remove the hooks, which would keep the replica and its parameters alive."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Broadcast the buffers and run the model. The second call forms the buckets."""
        if self._ready and not self._buckets:
            self._form_buckets()
        self._num_missing = [0] * len(self._buckets)
        for index in self._bucket_of.values():
            self._num_missing[index] += 1
        buffers = list(self.module.buffers())
        group = dist.group.WORLD
        if buffers and group is not None:
            broadcast_buffers(group, buffers, _BROADCAST_LIMIT)
        return self.module(*args, **kwargs)

    def _form_buckets(self) -> None:
        ready = {id(parameter) for parameter in self._ready}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in ready:
                raise PredictionError(
                    f"`{name}` gets no gradient, for which DistributedDataParallel would wait; freeze it with "
                    "`requires_grad_(False)`, or remove it."
                )
        for index, members in enumerate(bucket_assignment(list(self._ready), _BUCKET_LIMITS)):
            parameters = [self._ready[member] for member in members]
            num_elements = sum(parameter.numel() for parameter in parameters)
            self._buckets.append(torch.empty(num_elements, dtype=parameters[0].dtype, device=parameters[0].device))
            self._bucket_of |= {id(parameter): index for parameter in parameters}

    def _note_gradient(self, parameter: Tensor) -> None:
        if not self._buckets:
            assert isinstance(parameter, nn.Parameter)
            self._ready.append(parameter)
            return
        index = self._bucket_of[id(parameter)]
        self._num_missing[index] -= 1
        if not self._num_missing[index]:
            dist.all_reduce(self._buckets[index])
