"""The function that a file for inference computes: its input, its output, and how to prepare the input."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import revnet
from revnet._checks import check_path
from revnet._outside_text import encodable
from revnet.data import Preprocess
from revnet.models._density import AbstractImageDensity
from revnet.training.classification.model import NO_PREPROCESS, Classifier
from revnet.training.density.model import ImageDensity
from revnet.training.image_data import TEST_CROP
from revnet.training.language.model import LanguageHeader, LanguageModel
from revnet.training.run.checkpoint import find_weights, read_weights
from revnet.training.saved_module import SavedModule

_FAMILIES: dict[str, type[SavedModule]] = {"classifier": Classifier, "nice": ImageDensity, "lm": LanguageModel}


class FreeSize(NamedTuple):
    """A dimension of any size."""

    name: str
    """Name of the dimension."""
    most: int | None = None
    """Largest size, or None."""


_BATCH = FreeSize("batch")


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A function from one tensor to another, and everything that a program needs to call it."""

    module: nn.Module
    """Module that computes the function, in evaluation mode on the CPU."""

    input_name: str
    """Name of the input."""

    output_name: str
    """Name of the output."""

    draw_input: Callable[[int, torch.Generator], Tensor]
    """Function that draws a random input with a given number of samples."""

    free_sizes: dict[int, FreeSize]
    """Dimensions of the input whose size is free. The first one is the batch."""

    metadata: dict[str, str]
    """Description of the input and the output. Lists are in JSON."""

    on_grid: bool = False
    """Whether streams are rounded to a fixed-point grid."""


class LogProb(nn.Module):
    """The log-density of dequantized images.

    Args:
        model: The density.
    """

    def __init__(self, model: AbstractImageDensity) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Compute the log-density of each image in nats, (B,)."""
        return self.model.log_prob(x)


def read_inference(checkpoint: str | Path) -> Inference:
    """Rebuild the model of a run as a function for inference.

    A classifier maps images to logits, a language model maps tokens to logits, and a density maps dequantized images to
    their log-density.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file, or the folder of a run, whose last weights are used.

    Raises:
        CheckpointError: The file cannot be read, or its model is the user's own code.
    """
    check_path("checkpoint", checkpoint, hint="a file of weights, or the folder of a run")
    path = find_weights(Path(checkpoint))
    header, tensors = read_weights(path)
    family = _FAMILIES.get(header.get("kind", "classifier"), Classifier)
    module = family.from_tensors(family.header_type.from_metadata(header, path), tensors, path).eval()
    module.requires_grad_(False)
    if isinstance(module, ImageDensity):
        return _of_density(module)
    if isinstance(module, LanguageModel):
        return _of_language_model(module)
    assert isinstance(module, Classifier)
    return _of_classifier(module)


def _of_classifier(classifier: Classifier) -> Inference:
    header, preprocess = classifier.header, classifier.preprocess
    is_float = header.preprocess == NO_PREPROCESS
    metadata = {
        "input": f"images, (batch, channels, height, width), {'float32' if is_float else 'uint8, 0 to 255'}",
        "output": "logits, (batch, classes), float32; softmax turns them into probabilities",
        "labels": json.dumps(header.class_names),
        "image_shape": json.dumps(header.image_shape),
        "resize": _describe_resize(is_resized=header.is_resized),
    }
    if isinstance(preprocess, Preprocess):
        metadata |= {
            "preprocess": "(images - mean) / std, which the file computes itself",
            "mean": _to_json(preprocess.mean),
            "std": _to_json(preprocess.scale),
        }

    def draw_images(count: int, generator: torch.Generator) -> Tensor:
        shape = (count, *header.image_shape)
        if is_float:
            return torch.randn(shape, generator=generator)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    return Inference(
        module=classifier,
        input_name="images",
        output_name="logits",
        draw_input=draw_images,
        free_sizes={0: _BATCH},
        metadata=_describe_run(header.model, header.data) | metadata,
        on_grid=header.is_exact,
    )


def _of_language_model(language_model: LanguageModel) -> Inference:
    header, model = language_model.header, language_model.model
    attention = header.options.get("attention", "full")
    # The other kinds of attention divide the sequence into blocks, whose number a file fixes.
    has_free_length = attention == "full" and model.max_length > 2
    length = min(model.max_length, 64) if has_free_length else model.max_length
    metadata = {
        **_describe_tokens(header),
        "length": f"at most {model.max_length}" if has_free_length else str(length),
    }

    def draw_tokens(count: int, generator: torch.Generator) -> Tensor:
        size = length - count % 5 if has_free_length and length > 8 else length
        return torch.randint(model.vocab_size, (count, size), generator=generator)

    return Inference(
        module=language_model,
        input_name="tokens",
        output_name="logits",
        draw_input=draw_tokens,
        free_sizes={0: _BATCH} | ({1: FreeSize("length", model.max_length)} if has_free_length else {}),
        metadata=_describe_run(header.model, header.data) | metadata,
        on_grid=attention == "lsh",
    )


def _describe_tokens(header: LanguageHeader) -> dict[str, str]:
    output = "logits of the next token at each position, (batch, length, {}), float32"
    if header.tokenizer is None:
        return {
            "input": "tokens, (batch, length), int64; a token is the index of a character in `labels`",
            "output": output.format("characters"),
            "labels": json.dumps(list(header.characters)),
        }
    return {
        "input": "tokens, (batch, length), int64, of the tokenizer whose tokenizer.json is in `tokenizer`",
        "output": output.format("tokens"),
        "tokenizer": header.tokenizer,
    }


def _of_density(density: ImageDensity) -> Inference:
    header = density.header
    levels = header.num_levels
    metadata = {
        "input": "images, (batch, channels, height, width), float32 from 0 to 1: (level + u) / num_levels, where u is "
        "uniform from 0 to 1",
        "output": "log-density in nats, (batch,), float32; bits per dimension are log2(num_levels) - output / "
        "(dimensions * ln(2))",
        "num_levels": str(levels),
        "image_shape": json.dumps(header.image_shape),
        "resize": _describe_resize(is_resized=header.is_resized),
    }

    def draw_images(count: int, generator: torch.Generator) -> Tensor:
        pixels = torch.randint(256, (count, *header.image_shape), dtype=torch.uint8, generator=generator)
        return density.dequantize(pixels, generator)

    return Inference(
        module=LogProb(density.model),
        input_name="images",
        output_name="log_prob",
        draw_input=draw_images,
        free_sizes={0: _BATCH},
        metadata=_describe_run(header.model, header.data) | metadata,
    )


def _describe_run(model: str, data: str) -> dict[str, str]:
    return {"revnet_version": revnet.__version__, "model": model, "data": encodable(data)}


def _describe_resize(*, is_resized: bool) -> str:
    if not is_resized:
        return "none: the images of the data set have this shape"
    return f"resize the image so that it just covers height / {TEST_CROP} and width / {TEST_CROP}; cut out the center"


def _to_json(statistics: Tensor) -> str:
    """Return one number for each channel; an image is named only, as the file computes with it."""
    if statistics.numel() != len(statistics):
        return json.dumps(f"an image of the shape {tuple(statistics.shape)}")
    return json.dumps([float(f"{number:.9g}") for number in statistics.flatten().tolist()])
