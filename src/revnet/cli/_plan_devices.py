"""`revnet plan --devices`: a training step on several devices."""

from dataclasses import dataclass, replace
from typing import Literal

from revnet._units import counted
from revnet.cli._errors import UsageError
from revnet.cli._step_flags import StepFlags
from revnet.training.settings.checks import check_integer

Strategy = Literal["ddp", "fsdp2", "pipeline"]
ShardUnit = Literal["block", "function"]

_MOST = 1024
_WAYS = {
    "ddp": "each with a whole model",
    "fsdp2": "each with a part of every parameter, sharded by {unit}",
    "pipeline": "each with some of the blocks, {microbatches} microbatches",
}


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """The options of `revnet plan` for several devices, checked before PyTorch is loaded.

    Raises:
        ValueError: An option is out of range, or is missing, or conflicts with another.
    """

    devices: int | None
    strategy: Strategy | None
    shard_unit: ShardUnit | None
    keep_gathered: bool
    microbatches: int | None

    @property
    def is_given(self) -> bool:
        """Whether the step runs on several devices."""
        return self.devices is not None

    def __post_init__(self) -> None:
        own = {
            "--strategy": self.strategy is not None,
            "--shard-unit": self.shard_unit is not None,
            "--keep-gathered": self.keep_gathered,
            "--microbatches": self.microbatches is not None,
        }
        if self.devices is None:
            for flag, is_set in own.items():
                if is_set:
                    raise UsageError(f"`{flag}` needs `--devices`: the number of devices, such as --devices 8.")
            return
        check_integer("--devices", self.devices, at_least=1, at_most=_MOST)
        if self.strategy is None:
            raise UsageError(f"`--devices` (={self.devices}) needs `--strategy`: ddp, fsdp2 or pipeline.")
        for flag, strategy in (("--shard-unit", "fsdp2"), ("--keep-gathered", "fsdp2"), ("--microbatches", "pipeline")):
            if own[flag] and self.strategy != strategy:
                raise UsageError(f"`{flag}` is for `--strategy {strategy}`; leave it out for {self.strategy}.")
        if self.microbatches is not None:
            check_integer("--microbatches", self.microbatches, at_least=1)
            if self.microbatches < self.devices:
                raise UsageError(
                    f"`--microbatches` (={self.microbatches}) must be at least `--devices` (={self.devices}), or some "
                    f"devices would only wait; pass {4 * self.devices}."
                )

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches of a pipeline: four for each device by default."""
        return self.microbatches or 4 * (self.devices or 1)


def check_with_step(flags: StepFlags, device_flags: DeviceFlags, *, measure: bool, out_dir: str | None) -> None:
    """Raise unless the step can run on several devices, and its batch can be divided."""
    if measure:
        raise UsageError("`--measure` times steps on one device; leave it out, or leave out `--devices`.")
    if flags.loss != "sum":
        raise UsageError(f"`--loss` (={flags.loss}) is for one device; leave it out with `--devices`.")
    if out_dir is not None:
        raise UsageError("`--out-dir` is for the picture of a plan on one device; leave it out with `--devices`.")
    if flags.device not in ("auto", "cpu"):
        raise UsageError(
            f"`--device` (={flags.device}) must be auto or cpu with `--devices`, which counts bytes of processes on "
            "CPUs; leave it out."
        )
    parts, name = device_flags.devices or 1, "`--devices`"
    if device_flags.strategy == "pipeline":
        parts = device_flags.num_microbatches
        name = "`--microbatches`" if device_flags.microbatches else "the number of microbatches"
    if flags.batch % parts:
        raise UsageError(
            f"`--batch` (={flags.batch}) is the batch of all devices and must be divisible by {name} (={parts}); pass "
            f"{parts * -(-flags.batch // parts)}."
        )


def plan_devices(flags: StepFlags, device_flags: DeviceFlags, budget: str | None) -> None:
    """Print the memory of each device and the communication of a step, and compare the peak with the budget.

    Raises:
        BudgetError: The peak exceeds the budget.
    """
    from revnet.cli._build import build_step
    from revnet.errors import BudgetError
    from revnet.memory import format_bytes, parse_bytes, predict_distributed

    assert device_flags.devices is not None
    assert device_flags.strategy is not None
    budget_bytes = None if budget is None else parse_bytes(budget, "--budget")
    step = build_step(replace(flags, device="cpu"))
    is_pipeline = device_flags.strategy == "pipeline"
    memory = predict_distributed(
        step.model,
        *step.inputs,
        num_devices=device_flags.devices,
        strategy=device_flags.strategy,
        shard_unit=device_flags.shard_unit or "block",
        reshard_after_forward=not device_flags.keep_gathered,
        num_microbatches=device_flags.num_microbatches if is_pipeline else None,
        **step.options,
    )
    way = _WAYS[device_flags.strategy].format(
        unit=device_flags.shard_unit or "block", microbatches=device_flags.num_microbatches
    )
    print(f"{step.description}\n{device_flags.strategy}, {counted(device_flags.devices, 'device')}, {way}\n\n{memory}")
    if budget_bytes is None:
        return
    left = budget_bytes - memory.peak_bytes
    if left < 0:
        raise BudgetError(
            f"`--budget` (={format_bytes(budget_bytes)}) is {format_bytes(-left)} below the peak of a device, "
            f"{format_bytes(memory.peak_bytes)}; use more `--devices`, another `--strategy`, or a smaller `--batch`.",
            missing_bytes=-left,
            least_bytes=memory.peak_bytes,
        )
    print(f"\nbudget {format_bytes(budget_bytes)} on each device, of which {format_bytes(left)} are left")
