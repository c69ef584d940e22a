"""The arithmetic of a run: plugins of Lightning, and parameters in bfloat16."""

from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from revnet.training.settings.run_config import AbstractRunConfig

_IN_BFLOAT16 = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def precision_arguments(config: AbstractRunConfig, device_type: str) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer for the precision of `config`.

    Returns:
        `precision`, or `plugins` where Lightning's own choice is another one.
    """
    if config.precision == "16-mixed":
        # On a CPU, Lightning would take bfloat16 instead.
        return {"plugins": [MixedPrecision("16-mixed", device_type, torch.amp.GradScaler(device_type))]}
    # Lightning's `bf16-true` casts everything, streams and batch norm statistics included.
    return {"precision": "bf16-mixed" if config.precision == "bf16-true" else config.precision}


def autocast_dtype(config: AbstractRunConfig) -> torch.dtype | None:
    """Return the type that autocast computes in; None without autocast."""
    return {"32-true": None, "16-mixed": torch.float16}.get(config.precision, torch.bfloat16)


def convert_parameters(model: nn.Module, config: AbstractRunConfig) -> None:
    """Cast the parameters of convolutions, linear layers and embeddings to bfloat16, for `bf16-true`.

    Norms stay in float32. The run computes under autocast, in which streams stay in float32, too: a stream in bfloat16
    could not be rebuilt.
    """
    if config.precision == "bf16-true":
        for module in model.modules():
            if isinstance(module, _IN_BFLOAT16):
                module.to(torch.bfloat16)


def restore_parameters(model: nn.Module, config: AbstractRunConfig) -> None:
    """Cast all parameters back to float32, for evaluation without autocast."""
    if config.precision == "bf16-true":
        model.float()
