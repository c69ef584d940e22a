"""The updates of a run, as arguments of Lightning's Trainer."""

from typing import Any

from revnet.training.settings.run_config import AbstractRunConfig


def update_arguments(config: AbstractRunConfig) -> dict[str, Any]:
    """Return the arguments for accumulation, clipping and validation."""
    arguments: dict[str, Any] = {
        "accumulate_grad_batches": config.accumulate,
        "gradient_clip_val": config.max_grad_norm,
    }
    # With the step in the backward pass, a hook on each parameter clips its gradient.
    if config.max_grad_value is not None and not config.step_in_backward:
        arguments |= {"gradient_clip_val": config.max_grad_value, "gradient_clip_algorithm": "value"}
    if config.val_every is not None:
        # Lightning counts batches, of which an update has several, and not from the start of each epoch.
        arguments |= {"val_check_interval": config.val_every * config.accumulate, "check_val_every_n_epoch": None}
    return arguments
