"""A transformer with the characters that it knows: text in, text out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from revnet.data import Vocabulary
from revnet.errors import CheckpointError
from revnet.models import ReversibleTransformer
from revnet.training._checkpoint import find_weights, read_weights
from revnet.training._product import AbstractHeader, begin_metadata, check_fit, check_metadata


@dataclass(frozen=True, kw_only=True)
class LanguageHeader(AbstractHeader):
    """What it takes to rebuild a language model, but the tensors."""

    model: str = "lm"
    """Name of the model."""

    data: str
    """File that it was trained on."""

    characters: str
    """The vocabulary."""

    options: Mapping[str, Any]
    """What the transformer is built with."""

    def to_metadata(self) -> dict[str, str]:
        """Give the header as the flat strings that safetensors stores."""
        return begin_metadata("lm") | {
            "model": self.model,
            "data": self.data,
            "characters": json.dumps(self.characters),
            "options": json.dumps(dict(self.options)),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> Self:
        """Read what `to_metadata` gave; `path` is for the error message.

        Raises:
            CheckpointError: The metadata are not revnet's, of a later format, or of no language model.
        """
        check_metadata(metadata, path, "lm")
        try:
            return cls(
                model=metadata["model"],
                data=metadata["data"],
                characters=json.loads(metadata["characters"]),
                options=json.loads(metadata["options"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` was not written by `revnet train`; its header is not revnet's.") from error


class LanguageModel(nn.Module):
    """Characters in, the next ones out.

    Shape:
        tokens: (B, T), integers, see `vocabulary`. Output: logits of each token's successor, (B, T, vocabulary).
    """

    def __init__(self, model: ReversibleTransformer, header: LanguageHeader) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = Vocabulary(header.characters)
        self.header = header

    @classmethod
    def create(cls, header: LanguageHeader) -> Self:
        """Make a model with freshly drawn weights."""
        return cls(ReversibleTransformer(vocab_size=len(header.characters), **header.options), header)

    @classmethod
    def from_tensors(cls, header: LanguageHeader, tensors: Mapping[str, Tensor], path: Path) -> Self:
        """Rebuild a model from its state; `path` is for the error message.

        Raises:
            CheckpointError: The model cannot be built, or the tensors do not fit it.
        """
        try:
            language_model = cls.create(header)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` cannot be rebuilt: {error}") from error
        check_fit(language_model, tensors, path)
        language_model.load_state_dict(tensors)
        return language_model

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits."""
        return self.model(tokens)

    def generate(self, prompt: str, num_new: int, **options: Any) -> str:
        """Continue a text by so many characters; see `ReversibleTransformer.generate`, which takes the `options`.

        Returns:
            What follows the prompt, without it.

        Raises:
            ValueError: The prompt is empty, or has a character that the model does not know.
        """
        if not prompt:
            raise ValueError("`prompt` (='') must not be empty; pass how the text begins, a newline for instance.")
        tokens = self.vocabulary.encode(prompt, "prompt")
        place = next(self.parameters()).device
        found = self.model.generate(tokens[None].to(place), num_new, **options)
        return self.vocabulary.decode(found[0, len(tokens) :])


def load_language_model(path: str | Path) -> LanguageModel:
    """Rebuild the language model that a run of `revnet train lm` has left, on the CPU and in evaluation mode.

    Args:
        path: A `.safetensors` file, a `.ckpt` file, or the folder of a run, whose last weights are taken.

    Raises:
        CheckpointError: There is no such file, it is truncated, holds another kind of model, or its tensors do not fit.
    """
    path = find_weights(Path(path))
    metadata, tensors = read_weights(path)
    return LanguageModel.from_tensors(LanguageHeader.from_metadata(metadata, path), tensors, path).eval()
