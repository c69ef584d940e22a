"""Start a language model from trained weights, whose characters may be others."""

from collections.abc import Sequence

import torch

from revnet.errors import CheckpointError
from revnet.training.language.model import LanguageHeader, LanguageModel
from revnet.training.run.run_dir import TOKENIZER
from revnet.training.starting import StartWeights, describe_start, load_start_weights

_TABLES = ("embedding.weight", "head.weight", "head.bias")
"""Tensors with a row for each character."""


def load_start(language_model: LanguageModel, start: StartWeights) -> str:
    """Load the weights into a language model, character by character where the vocabularies differ.

    Returns:
        What was loaded, in one line.

    Raises:
        CheckpointError: The weights are of a model with other settings or another tokenizer.
    """
    old: LanguageHeader = start.header
    header = language_model.header
    if old.tokenizer != header.tokenizer:
        way_out = "`characters`" if old.tokenizer is None else f"the {TOKENIZER} of its run"
        raise CheckpointError(
            f"`weights` (='{start.path}') are of a model with another tokenizer; pass {way_out} as `tokenizer`."
        )
    tensors = dict(start.network)
    shared = [character for character in header.characters if character in old.characters]
    new = [character for character in header.characters if character not in old.characters]
    if old.characters != header.characters:
        rows, old_rows = _indices(shared, header.characters), _indices(shared, old.characters)
        state = language_model.model.state_dict()
        for name in _TABLES:
            if name in tensors and name in state and tensors[name].shape[1:] == state[name].shape[1:]:
                table = state[name].clone()
                table[rows] = tensors[name][old_rows]
                tensors[name] = table
    load_start_weights(language_model.model, tensors, start.path)
    if not new:
        return describe_start(start.path, ())
    return describe_start(start.path, [f"the rows of {''.join(new)!r}"], " characters")


def _indices(characters: Sequence[str], vocabulary: str) -> torch.Tensor:
    return torch.tensor([vocabulary.index(character) for character in characters], dtype=torch.int64)
