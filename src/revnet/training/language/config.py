"""The settings of a run that trains a language model."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from revnet.training.settings.fields import integer, number
from revnet.training.settings.run_config import AbstractRunConfig

Attention = Literal["full", "lsh", "hierarchical"]
Form = Literal["coupled", "midpoint", "leapfrog", "stored"]
Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]

# As in `revnet.data`, which would load PyTorch; `revnet train lm --help` does without.
_CHARACTERS = "characters"
_LEAST_TOKENS = 257


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(AbstractRunConfig):
    """Settings of a run that trains a reversible transformer to continue text, token by token.

    The defaults are a small model, for a text of about a megabyte. `configs/` holds complete recipes.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range, or does not go with another.

    References:
        Kitaev, Kaiser and Levskaya (2020), Reformer: The Efficient Transformer.
        Zhu and Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences.
    """

    command: ClassVar[str] = "revnet train lm"
    title: ClassVar[str] = "settings"
    usual_beta2: ClassVar[float] = 0.99

    task: Literal["lm"] = "lm"
    """Task of the run, which distinguishes a file of these settings from others."""

    data: str | None = None
    """Text in UTF-8; required. A text file, a folder whose .txt files are documents, or a .jsonl file whose lines have
    a document in the field `text`. The last tenth, see `val_fraction`, is held out for validation."""

    tokenizer: str = "characters"
    """Tokens of the text: `characters`; `bpe`, byte-level BPE trained on the training text; or the path of a
    tokenizer.json of byte-level BPE. Compare different tokens by bits per byte."""

    vocab_size: int | None = integer(None, at_least=_LEAST_TOKENS)
    """Number of tokens of `bpe`, by default 4,096; there are fewer if a short text has no more."""

    cross_documents: bool = False
    """Whether tokens see earlier documents in the same window, for which attention needs no mask; for several documents
    only."""

    length: int = integer(128, at_least=1)
    """Tokens of a window: the longest context of the model."""

    depth: int = integer(4, at_least=1)
    """Number of reversible blocks, each with an attention and a feed-forward network."""

    dim: int = integer(128, at_least=1)
    """Features of a token in each of the two streams; a multiple of twice `num_heads`."""

    num_heads: int = integer(4, at_least=1)
    """Number of attention heads."""

    form: Form = "coupled"
    """How the residuals of a block are combined with its streams: `coupled`, attention and feed-forward network update
    one stream each; `midpoint` or `leapfrog`, the residual of the whole block is added to the outputs of the last two
    blocks; or `stored`, an ordinary transformer, which cannot be reversed."""

    step_size: float | None = number(None, "above 0", lambda x: x > 0, usual="0.5")
    """Step size of the form `midpoint`, by default 0.5, or `leapfrog`, by default 1."""

    exact: bool = False
    """Whether to keep the streams on a fixed-point grid, so that the backward pass reconstructs them bit for bit."""

    drift_every: int | None = integer(None, at_least=1)
    """Number of updates from one measurement of drift to the next, where drift is the distance of reconstructed
    activations from the true ones; by default, it is not measured."""

    num_kv_heads: int | None = integer(None, at_least=1)
    """Number of heads of the keys and values, a divisor of `num_heads`; by default, `num_heads`."""

    norm: Norm = "layer"
    """Kind of norm: `layer`, or `rms`."""

    mlp: Mlp = "gelu"
    """Kind of feed-forward network: `gelu`, or `swiglu`, whose hidden layer is gated."""

    bias: bool = True
    """Whether feed-forward networks, layer norms and the head have biases."""

    tie_embeddings: bool = False
    """Whether the weight of the head is the embedding."""

    ff_mult: float = number(4.0, "above 0", lambda x: x > 0, usual="4")
    """Width of the hidden layer of the feed-forward networks, as a multiple of `dim`."""

    ff_chunks: int = integer(1, at_least=1)
    """Number of chunks of the window that the feed-forward networks process one after another, to save memory."""

    dropout: float = number(0.0, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.1")
    """Share of features dropped in training."""

    attention: Attention = "full"
    """Kind of attention: `full`; `lsh`, among tokens whose keys fall into the same bucket (Reformer); or
    `hierarchical`, exact nearby and coarser with distance (H-Transformer-1D). The last two are for long windows."""

    bucket_size: int = integer(32, at_least=1)
    """Average number of tokens in a bucket; for `lsh` only."""

    num_hashes: int = integer(4, at_least=1)
    """Rounds of hashing; for `lsh` only."""

    block_size: int = integer(32, at_least=1)
    """Tokens of a block, even; for `hierarchical` only."""

    chunked_loss: bool | None = None
    """Whether the loss computes its logits for some tokens at a time, which saves memory. By default, it does if there
    are more different tokens than twice `dim`, unless the plan for a `memory_budget` is faster without."""

    epochs: int = integer(4, at_least=1)
    """Number of epochs, each of `updates_per_epoch`; the model is validated and saved at the end of each."""

    updates_per_epoch: int | None = integer(None, at_least=1)
    """Updates of an epoch. By default, an epoch reads about as many tokens as the training text has, in at most 500
    updates."""

    max_updates: int | None = integer(None, at_least=1)
    """Number of updates after which to stop, mid-epoch if necessary; by default, all `epochs` are completed."""

    batch_size: int = integer(32, at_least=1)
    """Windows per update, from random positions of the text."""

    lr: float = number(2e-3, "above 0", lambda x: x > 0, usual="0.001")

    warmup: float = number(0.05, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.05")

    weight_decay: float = number(0.1, "0 or more", lambda x: x >= 0, usual="0.1")

    max_grad_norm: float | None = number(1.0, "above 0", lambda x: x > 0, usual="1")

    val_fraction: float = number(0.1, "above 0 and below 1", lambda x: 0 < x < 1, usual="0.1")
    """Share of the text, at its end, that is held out for validation."""

    val_windows: int | None = integer(1000, at_least=1)
    """Largest number of windows that a validation reads, spread evenly over its text; by default, all of it."""

    seed: int = integer(0, at_least=0, at_most=2**32 - 1)
    """Seed of the initial weights, the windows and dropout."""

    def _check_together(self) -> None:
        if self.vocab_size is not None and self.tokenizer == _CHARACTERS:
            raise ValueError(
                f"`vocab_size` (={self.vocab_size}) does not go with `tokenizer` (='characters'), which the text "
                "decides; leave it out, or pass the tokenizer `bpe`."
            )
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"`dim` (={self.dim}) must be a multiple of twice `num_heads` (={self.num_heads}), since a head has an "
                f"even number of features; pass {self.dim + -self.dim % (2 * self.num_heads)}."
            )
        self._check_form()
        if self.num_kv_heads is not None and (self.num_heads % self.num_kv_heads or self.attention == "lsh"):
            rule = f"divide `num_heads` (={self.num_heads})" if self.attention != "lsh" else "be left out for `lsh`"
            raise ValueError(f"`num_kv_heads` (={self.num_kv_heads}) must {rule}; by default, it is `num_heads`.")
        if self.block_size % 2:
            raise ValueError(f"`block_size` (={self.block_size}) must be even; pass {self.block_size + 1}.")

    def _check_form(self) -> None:
        if self.step_size is not None and self.form in ("coupled", "stored"):
            raise ValueError(
                f"`step_size` (={self.step_size:g}) is for the forms `midpoint` and `leapfrog`; leave it out."
            )
        if self.form != "stored":
            return
        reasons = {"exact": self.exact, "drift_every": self.drift_every, "hold": self.hold, "keep": self.keep}
        for name, value in reasons.items():
            if value:
                raise ValueError(
                    f"`{name}` (={value}) is for forms that are reversed, and `form` is `stored`; leave it out, or "
                    "choose another form."
                )
