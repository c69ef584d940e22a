"""`revnet doctor`."""

from revnet.cli._errors import UsageError, step_errors
from revnet.cli._step_flags import InputDtype, StepFlags, StepPrecision, open_folder, optional_picture
from revnet.cli._streams import print_while_writing
from revnet.training.settings.checks import check_number


def doctor(
    model: str,
    *,
    data: str | None = None,
    batch: int = 32,
    image: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_dtype: InputDtype = "float32",
    precision: StepPrecision = "32-true",
    gradients: bool = False,
    exact: bool = False,
    tolerance: float | None = None,
    device: str = "auto",
    out_dir: str | None = None,
) -> None:
    """Measure the error of rebuilt activations per block, and suggest remedies.

    Runs one training step without an optimizer. Prints the error of each reversible block's rebuilt input, the factor
    by which inverting the block amplifies errors, a verdict and its remedies, and plots errors against depth. Errors
    depend on weights and inputs: measure a checkpoint on its data rather than an untrained model.

    Examples:
        revnet doctor runs/cifar10_revnet110_1 --data path/to/cifar10 --gradients
        revnet doctor revnet110 --batch 16
        revnet doctor revnet110 --batch 16 --exact
        revnet doctor networks.text:make_model --input-shape [1024] --input-dtype int64

    Args:
        model: A .safetensors or .ckpt file written by `revnet train`, or the folder of a run, whose last weights are
            used; a name from `revnet models`, with random weights; or a model of your own as package.module:attribute.
            The attribute is an nn.Module, or a callable without arguments that returns one.
        data: Data set, by name or path, whose training images form the batch; noise by default.
        batch: Inputs per step.
        image: Height and width of the images; as published by default, or 224 for a model of your own.
        input_shape: Shape of one input to a model of your own that does not take images, such as [512].
        input_dtype: Type of the inputs to a model of your own; int64 for token ids.
        precision: Arithmetic: 32-true, or bf16-mixed for autocast to bfloat16.
        gradients: Also compare the gradients with the gradients from stored activations, which takes their memory.
        exact: Use exact reversal: streams on a fixed-point grid, rebuilt to the last bit.
        tolerance: Store streams at as few blocks as needed to keep errors below this, such as 1e-3.
        device: Device to run on: auto, cpu, cuda, cuda:1.
        out_dir: Folder for the picture; the current folder by default.
    """
    flags = StepFlags(
        model=model,
        batch=batch,
        image=image,
        input_shape=input_shape,
        input_dtype=input_dtype,
        optimizer="none",
        precision=precision,
        device=device,
    )
    if tolerance is not None:
        check_number("--tolerance", tolerance, "above 0 and below 1", lambda x: 0 < x < 1, "1e-3 is usual")
    if tolerance is not None and exact:
        raise UsageError("`--exact` leaves no error for `--tolerance` to bound; leave one of the two out.")
    words = ["exact"] * exact + ["tolerance"] * (tolerance is not None)
    picture = flags.picture("drift", *words)
    folder = open_folder(out_dir, picture)

    import torch

    from revnet.cli._doctor_inputs import build_doctor_inputs
    from revnet.coupling import FixedPoint
    from revnet.nn import set_coupling, set_tolerance
    from revnet.numerics import measure_drift

    doctor_inputs = build_doctor_inputs(flags, data)
    if exact:
        set_coupling(doctor_inputs.model, FixedPoint())
    if tolerance is not None:
        set_tolerance(doctor_inputs.model, tolerance)
    autocast = torch.bfloat16 if precision == "bf16-mixed" else None
    with step_errors():
        drift = measure_drift(
            doctor_inputs.model, doctor_inputs.inputs, loss=doctor_inputs.loss, gradients=gradients, autocast=autocast
        )
    with print_while_writing() as print_line, optional_picture(folder):
        print_line(f"{doctor_inputs.description}\n\n{drift}\n")
        drift.plot(folder / picture, title=", ".join([flags.title, *words]))
        print_line(f"picture  {folder / picture}")
