"""Every private part of PyTorch that the engine calls, with the reason, and what to do when it disappears.

Nothing else in `engine` names an underscored attribute of `torch`. When a release of PyTorch removes one of these, this
file is the one to change; the tests in `tests/engine/test_torch_internals.py` say which one is missing.
"""

from operator import methodcaller

import torch

# The public `torch.autograd.graph.saved_tensors_hooks` is a context manager that calls these two; entered and left for
# every residual function, it costs three times as much. Replacement: the context manager.
push_saved_tensors_hooks = torch._C._autograd._push_saved_tensors_default_hooks
pop_saved_tensors_hooks = torch._C._autograd._pop_saved_tensors_default_hooks

# `torch.enable_grad` and `torch.no_grad` as contexts call this. Replacement: `torch.set_grad_enabled`, which is slower.
set_grad_enabled = torch._C._set_grad_enabled

# The number that the next node of the autograd graph gets on this thread: a tensor whose node has a lower number was
# computed earlier. There is no public way to ask. Replacement: run a cheap operation and read its node's `_sequence_nr`.
next_sequence_number = torch._C._autograd._get_sequence_nr

# Whether a transform of `torch.func` wraps tensors just now, so that they have no values. Replacement: catch the error
# that reading a value raises.
in_functorch_transform = torch._C._are_functorch_transforms_active

# Called while `torch.func.grad` and others forbid saved-tensor hooks. Replacement: match the error's text.
hooks_are_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message

# Whether a profiler is on; asked before each replay, so that the name of the range is only built when it is seen.
# Replacement: enter `record_function` always.
profiler_is_on = torch.autograd._profiler_enabled


# Whether PyTorch was built for a device besides the CPU. `torch.accelerator` is public since 2.6.
HAS_ACCELERATOR = torch.accelerator.current_accelerator() is not None


def is_forward_mode() -> bool:
    """Return whether a level of forward-mode differentiation is open, in which saved tensors are other objects.

    Replacement: `torch.autograd.forward_ad` has no public question; treat every call as in forward mode (slower).
    """
    return torch.autograd.forward_ad._current_level >= 0


# The place of a node in the order in which nodes were created on its thread. Replacement: as `next_sequence_number`.
sequence_number_of = methodcaller("_sequence_nr")


def call_after_backward(callback: object) -> bool:
    """Have the autograd engine call `callback` when this backward pass ends; False outside of a backward pass.

    DistributedDataParallel and FSDP depend on the same call. Replacement: `Tensor.register_hook` on the lowest stream.
    """
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except RuntimeError:  # Outside of a backward pass: the caller looks at `grad_fn._saved_*`.
        return False
    return True
