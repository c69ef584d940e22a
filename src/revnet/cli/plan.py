"""`revnet plan`."""

import shlex
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, get_args

from revnet.cli._errors import UsageError, step_errors
from revnet.cli._plan_devices import DeviceFlags, ShardUnit, Strategy, check_with_step, plan_devices
from revnet.cli._plan_largest import BUDGET_IS_REQUIRED, Largest, LargestFlags, plan_largest
from revnet.cli._step_flags import (
    InputDtypes,
    InputShapes,
    OptimizerName,
    StepFlags,
    StepLoss,
    StepPrecision,
    open_folder,
    optional_picture,
)
from revnet.cli._streams import print_while_writing
from revnet.training.settings.choices import Optimizer

if TYPE_CHECKING:
    from revnet.cli._build import BuiltStep

_IN_PYTHON = {
    "sgd": "optimizer=partial(torch.optim.SGD, momentum=0.9)",
    "adam": "optimizer=torch.optim.Adam",
    "adamw": "optimizer=torch.optim.AdamW",
    "none": "",
}
_CHUNKED: dict[StepLoss, Literal["auto", True] | None] = {"sum": None, "cross-entropy": "auto", "chunked": True}
"""Argument `chunked_loss` of the plan."""


def plan(
    model: str,
    *,
    budget: str | None = None,
    batch: int = 32,
    image: int | None = None,
    input_shape: InputShapes | None = None,
    input_dtype: InputDtypes = "float32",
    optimizer: OptimizerName = "sgd",
    precision: StepPrecision = "32-true",
    step_in_backward: bool = False,
    loss: StepLoss = "sum",
    measure: bool = False,
    devices: int | None = None,
    strategy: Strategy | None = None,
    shard_unit: ShardUnit | None = None,
    keep_gathered: bool = False,
    microbatches: int | None = None,
    largest: Largest | None = None,
    multiple: int | None = None,
    dims: tuple[int, ...] | None = None,
    device: str = "auto",
    out_dir: str | None = None,
) -> None:
    """Fit a training step into a memory budget, at the least cost in time.

    Chooses a policy for each block. Prints the plan, its alternatives and how to use it, and plots time against memory.
    Bytes are counted from shapes, without running or allocating anything.

    With `--largest`, nothing is chosen either: prints the largest batch, image or patch that fits the budget if all
    blocks are reversed, checkpointed or stored.

    With `--devices`, nothing is chosen: prints the memory of each device and the communication of a step on several
    devices, as processes on CPUs would need them. None of these devices has to exist.

    Examples:
        revnet plan revnet104 --batch 256 --budget 16GiB
        revnet plan revnet104 --batch 1024 --devices 8 --strategy fsdp2 --budget 16GiB
        revnet plan resnet50 --batch 64 --budget 2GiB --measure
        revnet plan revnet104 --largest batch --budget 16GiB
        revnet plan networks.unet:make_model --largest patch --input-shape [1,64,64,64] --batch 1 --budget 16GiB
        revnet plan networks.text:make_model --input-shape [1024] --input-dtype int64 --budget 8GiB

    Args:
        model: A name from `revnet models`, or a model of your own as package.module:attribute. The attribute is an
            nn.Module, or a callable without arguments that returns one.
        budget: Memory that the step may use on each device, such as 16GiB or 500MB; required unless `--devices` is
            given. It holds the model, gradients, optimizer state, inputs and activations. On a GPU, leave room for the
            CUDA context and libraries.
        batch: Inputs per step, on all devices together.
        image: Height and width of the images; as published by default, or 224 for a model of your own.
        input_shape: Shape of one input to a model of your own that does not take images, such as [512]; for a model of
            several inputs, a list of their shapes, such as [[4,64,64,64],[10]].
        input_dtype: Type of the inputs to a model of your own; int64 for token ids. A list, such as [float32,int64],
            has one for each input.
        optimizer: Optimizer, whose state counts. sgd has momentum.
        precision: Arithmetic: 32-true, or bf16-mixed for autocast to bfloat16.
        step_in_backward: Let the plan move the optimizer's step into the backward pass, by
            revnet.optim.StepInBackward, if that makes a faster plan fit.
        loss: Loss of the step: sum of the outputs; cross-entropy, for a model of your own that takes `targets`, whose
            plan may divide the logits into chunks; or chunked, which divides them in any case.
        measure: Time real steps on random inputs instead of estimating times from shapes.
        devices: Number of devices, up to 1,024, for a step on several. They divide the batch.
        strategy: How they share the work: ddp copies the model to each, fsdp2 shards its parameters, and pipeline gives
            each some of the blocks. Required with `--devices`.
        shard_unit: What fsdp2 gathers at a time: block (default), or function for half a block.
        keep_gathered: With fsdp2, keep gathered parameters between the passes, which saves communication.
        microbatches: With pipeline, parts into which the batch is divided; four times the number of devices by default.
        largest: What to find the largest size of, under each policy: batch, image for the side of square images, or
            patch for the sides of `--input-shape`.
        multiple: Number of which the sides of the largest image or patch are multiples; the model's own by default.
        dims: Dimensions that change for the largest patch, counted with the batch as 0; all after the channels by
            default.
        device: Device of the step: auto, cpu, cuda, cuda:1.
        out_dir: Folder for the picture; the current folder by default.
    """
    flags = StepFlags(
        model=model,
        batch=batch,
        image=image,
        input_shape=input_shape,
        input_dtype=input_dtype,
        optimizer=optimizer,
        precision=precision,
        device=device,
        step_in_backward=step_in_backward,
        loss=loss,
    )
    device_flags = DeviceFlags(
        devices=devices,
        strategy=strategy,
        shard_unit=shard_unit,
        keep_gathered=keep_gathered,
        microbatches=microbatches,
    )
    largest_flags = LargestFlags(largest=largest, multiple=multiple, dims=dims)
    if largest_flags.is_given:
        largest_flags.check_with_step(flags, measure=measure, has_devices=device_flags.is_given, out_dir=out_dir)
        plan_largest(flags, largest_flags, budget)
        return
    if device_flags.is_given:
        check_with_step(flags, device_flags, measure=measure, out_dir=out_dir)
        plan_devices(flags, device_flags, budget)
        return
    if budget is None:
        raise UsageError(BUDGET_IS_REQUIRED)
    picture = flags.picture("plan")
    folder = open_folder(out_dir, picture)

    from revnet.cli._build import build_step
    from revnet.memory import MeasuredTiming, RooflineTiming, parse_bytes
    from revnet.memory import plan as make_plan

    budget_bytes = parse_bytes(budget, "--budget")
    step = build_step(flags)
    if sys.stderr.isatty():
        print("planning, which may take a few seconds ...", file=sys.stderr)
    if measure:
        step = _with_data(step, flags)
    with step_errors() if measure else nullcontext():
        step_plan = make_plan(
            step.model,
            *step.inputs,
            budget=budget_bytes,
            device=step.device,
            timing=MeasuredTiming() if measure else RooflineTiming(),
            step_in_backward="auto" if step_in_backward else False,
            chunked_loss=_CHUNKED[loss],
            **step.options,
        )
    with print_while_writing() as print_line, optional_picture(folder):
        print_line(f"{step.description}\n\n{step_plan}\n")
        step_plan.plot(folder / picture, title=flags.title)
        print_line(f"picture    {folder / picture}")
    _print_uses(flags, budget, step_in_backward=step_plan.step_in_backward)


def _with_data(step: "BuiltStep", flags: StepFlags) -> "BuiltStep":
    """Return the step with data, to time it."""
    from revnet.cli._build import materialize
    from revnet.memory import predict

    memory = predict(step.model, *step.inputs, device=step.device, **step.options)
    fixed = memory.parameter_bytes + memory.gradient_bytes + memory.input_bytes
    # The activations need not fit: the timing uses a smaller batch if it must.
    return materialize(step, flags, needed_bytes=fixed)


def _print_uses(flags: StepFlags, budget: str, *, step_in_backward: bool) -> None:
    """Print how to use a plan, in Python and in a training."""
    print(f"in Python  {_in_python(flags, budget, step_in_backward=step_in_backward)}")
    if step_in_backward:
        print("           revnet.optim.StepInBackward(optimizer)")
    # `revnet train` must have the model and the optimizer.
    if not flags.is_own and flags.optimizer in get_args(Optimizer):
        print(f"to train   {_to_train(flags, budget, step_in_backward=step_in_backward)}")


def _in_python(flags: StepFlags, budget: str, *, step_in_backward: bool) -> str:
    autocast = "autocast=torch.bfloat16" if flags.precision == "bf16-mixed" else ""
    stepping = "step_in_backward=True" if step_in_backward else ""
    arguments = [
        "model",
        "*inputs" if len(flags.input_dtypes) > 1 else "inputs",
        'kwargs={"targets": targets}' if flags.loss != "sum" else "",
        f'budget="{budget.strip()}"',
        _IN_PYTHON[flags.optimizer],
        autocast,
        stepping,
        f"chunked_loss={_CHUNKED[flags.loss]!r}".replace("'", '"') if flags.loss != "sum" else "",
    ]
    return f"revnet.memory.plan({', '.join(filter(None, arguments))}).apply(model)"


def _to_train(flags: StepFlags, budget: str, *, step_in_backward: bool) -> str:
    words = ["revnet", "train", "--model", flags.model, "--data", "path/to/images", "--batch-size", str(flags.batch)]
    if flags.image is not None:
        words += ["--image-size", str(flags.image)]
    if flags.optimizer != "sgd":
        words += ["--optimizer", flags.optimizer, "--lr", "0.001"]
    if flags.precision != "32-true":
        words += ["--precision", flags.precision]
    if step_in_backward:
        words.append("--step-in-backward")
    return shlex.join([*words, "--memory-budget", budget.strip()])
