"""`revnet memory`."""

from __future__ import annotations

from revnet.cli._step import InputDtype, OptimizerName, StepFlags, open_folder, without_matplotlib
from revnet.training.checks import check_integer
from revnet.training.choices import Policy, Precision


def memory(
    model: str,
    *,
    batch: int = 32,
    image: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_dtype: InputDtype = "float32",
    optimizer: OptimizerName = "sgd",
    precision: Precision = "32-true",
    policy: Policy | None = None,
    depth: int = 2,
    measure: bool = False,
    device: str = "auto",
    output_dir: str | None = None,
) -> None:
    """Tell where the memory of a training step goes: its peak, what that is of, and which module makes it.

    Prints a table, and draws what is alive from moment to moment. Bytes are counted from shapes, without running or
    allocating anything, unless `--measure` is given. The loss is the sum of the outputs, near enough to any that is
    computed from logits.

    Examples:
        revnet memory revnet104 --batch 256
        revnet memory resnet50 --policy checkpoint --precision bf16-mixed
        revnet memory networks.unet:UNet --image 512 --batch 8 --optimizer adamw --depth 1 --measure

    Args:
        model: One of `revnet models`, or one of your own, package.module:attribute: an nn.Module, or what makes one
            when it is called without arguments.
        batch: Inputs per step.
        image: Side of the images; as published if not given, 224 for your own models.
        input_shape: Shape of one input of your own model, if it takes no images, such as [512].
        input_dtype: Type of the inputs of your own model; int64 for token ids.
        optimizer: The optimizer, whose state counts; sgd has a momentum.
        precision: Arithmetic: 32-true, or bf16-mixed for autocast to bfloat16.
        policy: What is done with activations: reverse, checkpoint or store; as the model has it if not given.
        depth: How far down to list modules: 1 for the model's parts, 2 for theirs too.
        measure: Run a real step, on random inputs, and count what comes and goes.
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
    check_integer("--depth", depth, at_least=0)
    folder = open_folder(output_dir)

    from revnet.cli._build import build_step, running_it, with_data
    from revnet.errors import PredictionError
    from revnet.memory import StepMemory, format_bytes, plot_timeline, predict
    from revnet.memory import measure as measure_step
    from revnet.nn import set_policy

    step = build_step(flags)
    if policy is not None:
        set_policy(step.model, policy)
    found: StepMemory | None = None
    try:
        found = predict(step.model, step.inputs, device=step.device, **step.options)
    except PredictionError as error:  # of a model that needs values, which a real step has
        if not measure:
            way_out = "`revnet.memory.measure`, on a small batch"
            error.args = (str(error).replace(way_out, "`--measure`, on a small `--batch`"),)
            raise
    how = "predicted"
    if measure:
        how = "measured" if found is None else f"measured; the predicted peak is {format_bytes(found.peak_bytes)}"
        step = with_data(step, flags, needed_bytes=None if found is None else found.peak_bytes)
        if policy is not None:
            set_policy(step.model, policy)
        with running_it():
            found = measure_step(step.model, step.inputs, **step.options)
    assert found is not None
    print(f"{step.description}, {how}\n\n{found.report(depth=depth)}\n")
    with without_matplotlib():
        words = [] if policy is None else [policy]
        picture = flags.picture(folder, "memory", *words)
        plot_timeline(found, picture, title=", ".join([flags.title, *words]))
        print(f"picture  {picture}")
