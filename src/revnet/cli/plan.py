"""`revnet plan`."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from typing import get_args

from revnet.cli._step import InputDtype, OptimizerName, StepFlags, open_folder, without_matplotlib
from revnet.training.choices import Optimizer, Precision

_IN_PYTHON = {
    "sgd": "optimizer=partial(torch.optim.SGD, momentum=0.9)",
    "adam": "optimizer=torch.optim.Adam",
    "adamw": "optimizer=torch.optim.AdamW",
    "none": "",
}


def plan(
    model: str,
    *,
    budget: str | None = None,
    batch: int = 32,
    image: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_dtype: InputDtype = "float32",
    optimizer: OptimizerName = "sgd",
    precision: Precision = "32-true",
    measure: bool = False,
    device: str = "auto",
    output_dir: str | None = None,
) -> None:
    """Fit a training step into a budget of memory: a policy for each block, such that it takes the least time.

    Prints the plan, what else there was to choose from, and how to use it; draws time against memory. Bytes are counted
    from shapes, without running or allocating anything. The loss is the sum of the outputs, near enough to any that is
    computed from logits.

    Examples:
        revnet plan revnet104 --batch 256 --budget 16GiB
        revnet plan resnet50 --batch 64 --budget 2GiB --measure
        revnet plan networks.text:make_model --input-shape [1024] --input-dtype int64 --optimizer adamw --budget 8GiB

    Args:
        model: One of `revnet models`, or one of your own, package.module:attribute: an nn.Module, or what makes one
            when it is called without arguments.
        budget: Most memory that the step may take, such as 16GiB or 500MB; needed. Everything counts: model, gradients,
            optimizer, inputs, activations. On a GPU, leave room for what is no tensor.
        batch: Inputs per step.
        image: Side of the images; as published if not given, 224 for your own models.
        input_shape: Shape of one input of your own model, if it takes no images, such as [512].
        input_dtype: Type of the inputs of your own model; int64 for token ids.
        optimizer: The optimizer, whose state counts; sgd has a momentum.
        precision: Arithmetic: 32-true, or bf16-mixed for autocast to bfloat16.
        measure: Time real steps, on random inputs, in place of estimating times from shapes.
        device: Where the step is to run: auto, cpu, cuda, cuda:1.
        output_dir: Folder for the picture; this one if not given.
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
    )
    if budget is None:
        raise ValueError("`--budget` is needed: the memory that the step may take, such as --budget 16GiB.")
    folder = open_folder(output_dir)

    from revnet.cli._build import build_step, running_it, with_data
    from revnet.memory import MeasuredTiming, RooflineTiming, parse_bytes, predict
    from revnet.memory import plan as make_plan

    budget_bytes = parse_bytes(budget, "--budget")
    step = build_step(flags)
    if sys.stderr.isatty():
        print("planning, which may take some seconds ...", file=sys.stderr)
    if measure:
        memory = predict(step.model, step.inputs, device=step.device, **step.options)
        fixed = memory.parameter_bytes + memory.gradient_bytes + memory.input_bytes
        step = with_data(step, flags, needed_bytes=fixed)  # of the activations as many samples as fit are timed
    with running_it() if measure else nullcontext():
        made = make_plan(
            step.model,
            step.inputs,
            budget=budget_bytes,
            device=step.device,
            timing=MeasuredTiming() if measure else RooflineTiming(),
            **step.options,
        )
    print(f"{step.description}\n\n{made}\n")
    with without_matplotlib():
        picture = flags.picture(folder, "plan")
        made.plot(picture, title=flags.title)
        print(f"picture    {picture}")
    print(f"in Python  {_in_python(flags, budget)}")
    if not flags.is_own and optimizer in get_args(Optimizer):  # with which `revnet train` trains
        print(f"to train   {_to_train(flags, budget)}")


def _in_python(flags: StepFlags, budget: str) -> str:
    autocast = "autocast=torch.bfloat16" if flags.precision == "bf16-mixed" else ""
    arguments = ["model", "inputs", f'budget="{budget.strip()}"', _IN_PYTHON[flags.optimizer], autocast]
    return f"revnet.memory.plan({', '.join(filter(None, arguments))}).apply(model)"


def _to_train(flags: StepFlags, budget: str) -> str:
    words = ["revnet", "train", "--model", flags.model, "--data", "path/to/images", "--batch-size", str(flags.batch)]
    if flags.image is not None:
        words += ["--image-size", str(flags.image)]
    if flags.optimizer == "adamw":
        words += ["--optimizer", "adamw", "--lr", "0.001"]
    if flags.precision != "32-true":
        words += ["--precision", flags.precision]
    return shlex.join([*words, "--memory-budget", budget.strip()])
