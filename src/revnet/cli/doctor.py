"""`revnet doctor`."""

from __future__ import annotations

from revnet.cli._step import InputDtype, StepFlags, open_folder, without_matplotlib
from revnet.training.checks import check_number
from revnet.training.choices import Precision


def doctor(
    model: str,
    *,
    data: str | None = None,
    batch: int = 32,
    image: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_dtype: InputDtype = "float32",
    precision: Precision = "32-true",
    gradients: bool = False,
    exact: bool = False,
    tolerance: float | None = None,
    device: str = "auto",
    output_dir: str | None = None,
) -> None:
    """Tell how far rebuilt activations are from the true ones, block by block, and what to do about it.

    Runs one training step, without an optimizer. Prints the error of what each reversible block was given, by how much
    undoing the block amplifies errors, a verdict and what to do; draws errors by depth. Errors depend on weights and
    inputs: look at a checkpoint, on its data, rather than at a model that has not been trained.

    Examples:
        revnet doctor runs/cifar10_revnet110_1 --data path/to/cifar10 --gradients
        revnet doctor revnet110 --batch 16
        revnet doctor revnet110 --batch 16 --exact
        revnet doctor networks.text:make_model --input-shape [1024] --input-dtype int64 --precision bf16-mixed

    Args:
        model: A .safetensors or .ckpt file of `revnet train`, or the folder of a run; one of `revnet models`, with
            random weights; or one of your own, package.module:attribute: an nn.Module, or what makes one when it is
            called without arguments.
        data: Data set, by name or folder, whose training images are the batch; noise if not given.
        batch: Inputs of the step.
        image: Side of the images; as published if not given, 224 for your own models.
        input_shape: Shape of one input of your own model, if it takes no images, such as [512].
        input_dtype: Type of the inputs of your own model; int64 for token ids.
        precision: Arithmetic: 32-true, or bf16-mixed for autocast to bfloat16.
        gradients: Compare gradients with those of stored activations too, which needs the memory of these.
        exact: Look at it with streams on a fixed-point grid, which reverse to the last bit.
        tolerance: Look at it with streams kept at as many blocks as it takes for errors below this, such as 1e-3.
        device: Where to compute: auto, cpu, cuda, cuda:1.
        output_dir: Folder for the picture; this one if not given.
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
        raise ValueError("`--exact` leaves no error that a `--tolerance` could bound; leave one of the two out.")
    folder = open_folder(output_dir)

    import torch

    from revnet.cli._build import running_it
    from revnet.cli._specimen import build_specimen
    from revnet.coupling import FixedPoint
    from revnet.nn import set_coupling, set_tolerance
    from revnet.numerics import measure_drift

    specimen = build_specimen(flags, data)
    if exact:
        set_coupling(specimen.model, FixedPoint())
    if tolerance is not None:
        set_tolerance(specimen.model, tolerance)
    autocast = torch.bfloat16 if precision == "bf16-mixed" else None
    with running_it():
        drift = measure_drift(
            specimen.model, specimen.inputs, loss=specimen.loss, gradients=gradients, autocast=autocast
        )
    print(f"{specimen.description}\n\n{drift}\n")
    with without_matplotlib():
        words = ["exact"] * exact + ["tolerance"] * (tolerance is not None)
        picture = flags.picture(folder, "drift", *words)
        drift.plot(picture, title=", ".join([flags.title, *words]))
        print(f"picture  {picture}")
