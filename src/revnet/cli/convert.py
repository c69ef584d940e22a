"""`revnet convert`."""

from typing import Literal

from revnet.cli._errors import UsageError, step_errors
from revnet.cli._step_flags import InputDtypes, InputShapes, StepFlags, StepPrecision
from revnet.training.settings.checks import check_integer, check_number

Method = Literal["consistent", "bdia", "dr2net", "rewire"]


def convert(
    model: str,
    *,
    blocks: str | None = None,
    method: Method = "consistent",
    size: float = 0.25,
    fraction_bits: int = 14,
    pretrained: bool = False,
    batch: int = 8,
    image: int | None = None,
    input_shape: InputShapes | None = None,
    input_dtype: InputDtypes = "float32",
    precision: StepPrecision = "32-true",
) -> None:
    """Try the conversion of a model to a reversible one.

    Prints the blocks that `revnet.convert` converts, the activations of a training step before and after, how far the
    outputs move in evaluation mode for random inputs, and the lines of Python that do the same.

    Examples:
        revnet convert timm:vit_tiny_patch16_224 --blocks blocks --pretrained
        revnet convert torchvision:resnet50 --blocks layer1,layer2,layer3,layer4 --method bdia
        revnet convert transformers:gpt2 --blocks transformer.h --input-shape [128] --pretrained
        revnet convert networks.net:Net --blocks body --method rewire --image 64

    Args:
        model: A model of another library, as timm:NAME, torchvision:NAME or transformers:NAME, where the last NAME may
            be a folder; or a model of your own as package.module:attribute.
        blocks: Names of the lists of blocks in the model, separated by commas, such as layer1,layer2. By default, the
            command lists what the model has.
        method: How the streams are combined: consistent stays close to the original, bdia is the original in evaluation
            mode, dr2net has dual residual connections, and rewire is far from the original.
        size: Factor of the stream before; the size of the noise for bdia. rewire has none.
        fraction_bits: Bits of the fraction of the streams, which are reversed exactly; 0 for floating point.
        pretrained: Load trained weights, from the library's hub or from the folder; otherwise they are random.
        batch: Inputs per step.
        image: Height and width of the images; 224 by default.
        input_shape: Shape of an input of another kind, such as [128] for tokens.
        input_dtype: Type of the inputs; by default int64 for transformers with a shape of one number, else float32.
        precision: Arithmetic: 32-true, or bf16-mixed for autocast to bfloat16.
    """
    if ":" not in model:
        raise UsageError(
            f"`MODEL` (={model}) must be timm:NAME, torchvision:NAME, transformers:NAME or package.module:attribute."
        )
    if model.startswith("transformers:") and input_dtype == "float32" and len(input_shape or ()) == 1:
        input_dtype = "int64"
    flags = StepFlags(
        model=model,
        batch=batch,
        image=image,
        input_shape=input_shape,
        input_dtype=input_dtype,
        optimizer="none",
        precision=precision,
        device="cpu",
    )
    check_number("--size", size, "from 1/256 to below 1", lambda x: 1 / 256 <= x < 1, "0.25 is usual")
    check_integer("--fraction-bits", fraction_bits, at_least=0, at_most=22)
    if method == "bdia" and fraction_bits == 0:
        raise UsageError("`--fraction-bits` (=0) must be 1 or more for `--method` bdia, which is exact; 14 is usual.")

    from revnet.cli._try_conversion import try_conversion

    names = None if blocks is None else [name.strip() for name in blocks.split(",")]
    with step_errors():
        for line in try_conversion(flags, names, method, size, fraction_bits, pretrained=pretrained):
            print(line, flush=True)
