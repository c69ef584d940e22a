"""`revnet memory`."""

from revnet.cli._errors import UsageError, describe_error, step_errors
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
from revnet.training.settings.checks import check_integer
from revnet.training.settings.choices import Policy


def memory(
    model: str,
    *,
    batch: int = 32,
    image: int | None = None,
    input_shape: InputShapes | None = None,
    input_dtype: InputDtypes = "float32",
    optimizer: OptimizerName = "sgd",
    precision: StepPrecision = "32-true",
    policy: Policy | None = None,
    depth: int = 2,
    step_in_backward: bool = False,
    loss: StepLoss = "sum",
    measure: bool = False,
    device: str = "auto",
    out_dir: str | None = None,
) -> None:
    """Show where the memory of a training step goes, for any model.

    Prints the peak, what it consists of and which modules cause it, and plots the live memory over the step. Bytes are
    counted from shapes, without running or allocating anything, unless `--measure` is given.

    Examples:
        revnet memory revnet104 --batch 256
        revnet memory resnet50 --policy checkpoint --precision bf16-mixed
        revnet memory networks.unet:UNet --image 512 --batch 8 --optimizer adamw --measure

    Args:
        model: A name from `revnet models`, or a model of your own as package.module:attribute. The attribute is an
            nn.Module, or a callable without arguments that returns one.
        batch: Inputs per step.
        image: Height and width of the images; as published by default, or 224 for a model of your own.
        input_shape: Shape of one input to a model of your own that does not take images, such as [512]; for a model of
            several inputs, a list of their shapes, such as [[4,64,64,64],[10]].
        input_dtype: Type of the inputs to a model of your own; int64 for token ids. A list, such as [float32,int64],
            has one for each input.
        optimizer: Optimizer, whose state counts. sgd has momentum.
        precision: Arithmetic: 32-true, or bf16-mixed for autocast to bfloat16.
        policy: What to do with activations: reverse, checkpoint or store; unchanged by default.
        depth: Levels of modules to list: 1 for the parts of the model, 2 for their parts too.
        step_in_backward: Let the optimizer update each parameter in the backward pass and free its gradient, as
            revnet.optim.StepInBackward does.
        loss: Loss of the step: sum of the outputs; cross-entropy, for a model of your own that takes `targets`; or
            chunked, the same on some rows of logits at a time.
        measure: Run a real step on random inputs, and count what is allocated and freed.
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
    check_integer("--depth", depth, at_least=0)
    words = [*([] if policy is None else [policy]), *(["step-in-backward"] if step_in_backward else [])]
    picture = flags.picture("memory", *words)
    folder = open_folder(out_dir, picture)

    from revnet.cli._build import build_step, materialize
    from revnet.errors import PredictionError
    from revnet.memory import StepMemory, format_bytes, predict
    from revnet.memory import measure as measure_step
    from revnet.memory.step._predict import input_hint
    from revnet.memory.step._timeline_plot import plot_timeline
    from revnet.nn import set_policy

    step = build_step(flags)
    if policy is not None:
        set_policy(step.model, policy)
    step_memory: StepMemory | None = None
    try:
        step_memory = predict(
            step.model, *step.inputs, device=step.device, step_in_backward=step_in_backward, **step.options
        )
    except PredictionError as error:  # the model may need values, which a real step has
        if not measure and error.__cause__ is not None and input_hint(error.__cause__):
            raise
        if not measure:
            hint = "pass `--measure`, with a small `--batch`, to run a real step."
            raise UsageError(f"{describe_error(error).rstrip('.')}; {hint}") from error
    how = "predicted"
    if measure:
        predicted_bytes = None if step_memory is None else step_memory.peak_bytes
        how = "measured"
        if predicted_bytes is not None:
            how += f"; the predicted peak is {format_bytes(predicted_bytes)}"
        step = materialize(step, flags, needed_bytes=predicted_bytes)
        if policy is not None:
            set_policy(step.model, policy)
        with step_errors():
            step_memory = measure_step(step.model, *step.inputs, step_in_backward=step_in_backward, **step.options)
    assert step_memory is not None
    with print_while_writing() as print_line, optional_picture(folder):
        print_line(f"{step.description}, {how}\n\n{step_memory.report(depth=depth)}\n")
        plot_timeline(step_memory, folder / picture, title=", ".join([flags.title, *words]))
        print_line(f"picture  {folder / picture}")
