"""A language model: a transformer with its vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from revnet.coupling import FixedPoint
from revnet.data import Vocabulary
from revnet.data.tokens.abstract_vocabulary import AbstractVocabulary
from revnet.data.tokens.byte_pairs import BytePairVocabulary
from revnet.data.tokens.tokenizer_file import parse_tokenizer
from revnet.models import ReversibleTransformer
from revnet.training.run.checkpoint import load_module
from revnet.training.saved_module import AbstractHeader, SavedModule

SEPARATE, JOINED = "separate", "joined"
"""Values of `documents` in a header."""
DEFAULTS: Mapping[str, Any] = {
    "form": "coupled",
    "step_size": None,
    "exact": False,
    "num_kv_heads": None,
    "norm": "layer",
    "norm_eps": 1e-5,
    "mlp": "gelu",
    "bias": True,
    "tie_embeddings": False,
    "rope_theta": 10_000.0,
}
"""Options of a header that are left out if they have these values."""


def differing_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a header that differ from `DEFAULTS`."""
    return {name: value for name, value in options.items() if value != DEFAULTS[name]}


@dataclass(frozen=True, kw_only=True)
class LanguageHeader(AbstractHeader):
    """Everything that it takes to rebuild a language model, except its tensors."""

    kind: ClassVar[str] = "lm"

    model: str = "lm"
    """Name of the model."""

    data: str
    """Text file that the model was trained on."""

    characters: str
    """Characters of the vocabulary; none if it has other tokens."""

    tokenizer: str | None = None
    """Content of the tokenizer.json of a byte-level BPE vocabulary; None for characters."""

    documents: str | None = None
    """Whether the documents of the text are `separate` for attention, or `joined`; None if it is one text."""

    options: Mapping[str, Any]
    """Arguments of `ReversibleTransformer`, and `exact` for the coupling `FixedPoint()`. `DEFAULTS` are left out."""

    as_text: ClassVar[frozenset[str]] = AbstractHeader.as_text | {"tokenizer", "documents"}

    def to_metadata(self) -> dict[str, str]:
        """Return the header as the flat strings that safetensors stores, without what the model does not have."""
        known = replace(self, tokenizer=self.tokenizer or "", documents=self.documents or "")
        metadata = super(LanguageHeader, known).to_metadata()
        return {name: text for name, text in metadata.items() if getattr(self, name, "") is not None}

    def make_vocabulary(self) -> AbstractVocabulary:
        """Return the vocabulary.

        Raises:
            ValueError: The tokens are damaged.
        """
        if self.documents not in (None, SEPARATE, JOINED):
            raise ValueError(f"`documents` (={self.documents!r}) is unknown; update revnet")
        vocabulary: AbstractVocabulary
        if self.tokenizer is None:
            vocabulary = Vocabulary(self.characters)
        else:
            vocabulary = BytePairVocabulary(parse_tokenizer(self.tokenizer))
        if self.documents is not None and vocabulary.end_of_text is None:
            raise ValueError("its vocabulary has no token between documents")
        return vocabulary


class LanguageModel(SavedModule):
    """A transformer that predicts the next token.

    Shape:
        tokens: (B, T), integers, see `vocabulary`. Output: logits of the next token at each position, (B, T,
            vocabulary). With `targets`, (B, T), integers: the mean loss, ().
    """

    header_type: ClassVar[type[AbstractHeader]] = LanguageHeader
    header: LanguageHeader
    model: ReversibleTransformer

    def __init__(self, model: ReversibleTransformer, header: LanguageHeader) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = header.make_vocabulary()
        self.header = header

    @classmethod
    def create(cls, header: LanguageHeader) -> Self:
        """Make a model with random weights."""
        options = dict(header.options)
        coupling = FixedPoint() if options.pop("exact", False) else None
        vocab_size = len(header.make_vocabulary())
        return cls(ReversibleTransformer(vocab_size=vocab_size, coupling=coupling, **options), header)

    @classmethod
    def build(cls, header: LanguageHeader, tensors: Mapping[str, Tensor]) -> Self:
        """Build the language model of `header`."""
        return cls.create(header)

    def forward(self, tokens: Tensor, *, targets: Tensor | None = None) -> Tensor:
        """Compute the logits or, with the next token at each position as `targets`, the loss."""
        mask = self.number_documents(tokens)
        return self.model(tokens, mask) if targets is None else self.model(tokens, mask, targets=targets)

    def number_documents(self, tokens: Tensor) -> Tensor | None:
        """Return the number of the document of each token, from 1 on; None if tokens see earlier documents, too.

        A document begins with the end of the text before it.
        """
        if self.header.documents != SEPARATE:
            return None
        assert self.vocabulary.end_of_text is not None
        return 1 + torch.eq(tokens, self.vocabulary.end_of_text).cumsum(-1)

    @overload
    def generate(self, prompt: str, num_new: int, *, stop: str | None = None, **options: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], num_new: int, *, stop: str | None = None, **options: Any
    ) -> list[str]: ...

    def generate(
        self, prompt: str | Sequence[str], num_new: int, *, stop: str | None = None, **options: Any
    ) -> str | list[str]:
        """Continue a text, or several, by `num_new` tokens, or until the document ends.

        Args:
            prompt: Start of the text, or a list with the start of each text. A model of documents begins a new one if
                it is empty.
            num_new: Number of tokens to add.
            stop: Token at which a text ends; it is not part of the text.
            options: Options of `ReversibleTransformer.generate`.

        Returns:
            The continuation, without the prompt; a list of them for a list.

        Raises:
            ValueError: A prompt has a character that is not in the vocabulary, or is empty and the model has been
                trained on one text, or `stop` is not one token.
        """
        end = self.vocabulary.end_of_text if self.header.documents is not None else None
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or (end is None and not all(prompts)):
            raise ValueError(
                f"`prompt` (={prompt!r}) must not be empty; pass the start of the text, such as a newline."
            )
        rows = [self.vocabulary.encode(each, "prompt") if each else torch.tensor([end]) for each in prompts]
        stops = [] if stop is None else self.vocabulary.encode(stop, "stop").tolist()
        if stop is not None and len(stops) != 1:
            raise ValueError(f"`stop` (={stop!r}) must be one {self.vocabulary.noun} of the vocabulary.")
        stops += [] if end is None else [end]
        device = next(self.parameters()).device
        tokens, mask = _pad_left(rows)
        text = self.model.generate(tokens.to(device), num_new, mask=mask.to(device), stop_tokens=stops, **options)
        new = [_until(row, stops) for row in text[:, tokens.shape[1] :]]
        texts = [self.vocabulary.decode(row) for row in new]
        return texts[0] if isinstance(prompt, str) else texts

    @property
    def usual_prompt(self) -> str:
        """Prompt to begin with: the start of a document if there are several, otherwise a newline if there is one."""
        if self.header.documents is not None:
            return ""
        if isinstance(self.vocabulary, Vocabulary) and "\n" not in self.vocabulary.characters:
            return self.vocabulary.characters[0]
        return "\n"


def _pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the rows, padded on the left to one length, and a mask that is true for their own tokens."""
    length = max(map(len, rows))
    tokens = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows])
    return tokens, mask


def _until(row: Tensor, stops: Sequence[int]) -> Tensor:
    """Return the tokens before the first one in `stops`."""
    places = torch.isin(row, torch.tensor(stops, dtype=row.dtype, device=row.device)).nonzero()
    return row[: int(places[0])] if len(places) else row


def load_language_model(path: str | Path) -> LanguageModel:
    """Rebuild the language model of a run of `revnet train lm`, on the CPU and in evaluation mode.

    Args:
        path: A `.safetensors` file, a `.ckpt` file, or the folder of a run, whose last weights are loaded.

    Raises:
        CheckpointError: The file does not exist, is truncated, holds another kind of model, or its tensors do not fit.
    """
    return load_module(LanguageModel, path)
