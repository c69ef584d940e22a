"""A request of any process, on which all processes of a run agree without waiting for each other."""

import torch
from torch import Tensor, distributed

from revnet.training.processes.world import current_world


class Agreement:
    """Largest request of all processes, which all of them learn at the same update.

    With several processes the answer arrives one update late: it travels while the next update is computed. With one
    process it is the request itself.
    """

    def __init__(self) -> None:
        self._is_shared = current_world().num_processes > 1
        # The tensors stay on the CPU: a GPU would have to finish its work before an answer could be read.
        self._group = distributed.new_group(backend="gloo") if self._is_shared else None
        self._pending: tuple[Tensor, distributed.Work] | None = None

    def ask(self, request: int) -> int:
        """Send a request, and return the answer to the last one; 0 if there is none."""
        if not self._is_shared:
            return request
        answer = self._collect()
        self._send(0 if answer else request)  # it has been answered
        return answer

    def ask_now(self, request: int) -> int:
        """Return the largest request of all processes, once all of them ask."""
        if not self._is_shared:
            return request
        answer = self._collect()
        value = torch.tensor([request])
        distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self._group)
        return max(answer, int(value))

    def any(self, flag: bool) -> bool:
        """Return whether the flag of any process is set, once all of them ask."""
        value = torch.tensor([int(flag)])
        if self._is_shared:
            distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self._group)
        return bool(value)

    def _send(self, request: int) -> None:
        value = torch.tensor([request])
        work = distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (value, work)

    def _collect(self) -> int:
        if self._pending is None:
            return 0
        value, work = self._pending
        self._pending = None
        work.wait()
        return int(value)
