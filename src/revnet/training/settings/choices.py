"""Settings that are a choice among names."""

from typing import Literal

Preprocessing = Literal["standardize", "mean_image", "imagenet", "unit_range"]
Precision = Literal["32-true", "bf16-mixed"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Strategy = Literal["auto", "ddp", "fsdp2"]
Schedule = Literal["step", "cosine"]
Optimizer = Literal["sgd", "adamw"]
Policy = Literal["reverse", "checkpoint", "store"]
OnCorrupt = Literal["stop", "skip"]
