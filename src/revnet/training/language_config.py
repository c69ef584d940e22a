"""The settings of a run that trains a language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from revnet.training._adamw_settings import check_run_settings
from revnet.training._checks import check_choice, check_integer, check_name, check_number
from revnet.training._settings import load_settings, save_settings
from revnet.training.choices import Device, Policy, Precision

Attention = Literal["full", "lsh", "hierarchical"]


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Settings of one run that trains a reversible transformer to continue text, character by character.

    The defaults are a small model, for a text of about a megabyte. `configs/` holds complete recipes.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting lies outside its range.

    References:
        Kitaev, Kaiser and Levskaya (2020), Reformer: The Efficient Transformer.
        Zhu and Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences.
    """

    task: Literal["lm"] = "lm"
    """What is trained: tells a file of these settings from others."""

    data: str | None = None
    """Text file in UTF-8, needed. Its last tenth, see `val_fraction`, validates."""

    length: int = 128
    """Characters of a window: the most that the model looks back."""

    depth: int = 4
    """Reversible blocks, each of an attention and a perceptron."""

    dim: int = 128
    """Features of a character, in each of the two streams; a multiple of `num_heads`."""

    num_heads: int = 4
    """Heads of the attention."""

    ff_mult: float = 4.0
    """Width of the perceptrons inside, in units of `dim`."""

    ff_chunks: int = 1
    """Chunks of the window in which the perceptrons run, one after the other, to save memory."""

    dropout: float = 0.0
    """Share of features dropped in training."""

    attention: Attention = "full"
    """`full`; `lsh`, of characters whose keys fall into the same bucket (Reformer); or `hierarchical`, exact nearby and
    coarser with distance (H-Transformer-1D). The last two are for long windows."""

    bucket_size: int = 32
    """Characters of a bucket on average, of `lsh` only."""

    num_hashes: int = 4
    """Rounds of hashing, of `lsh` only."""

    block_size: int = 32
    """Characters of a block, even, of `hierarchical` only."""

    policy: Policy = "reverse"
    """What is done with activations: `reverse` computes those of reversible blocks again in the backward pass,
    `checkpoint` keeps what each block reads and computes the rest again, `store` keeps all, as the stored twin."""

    memory_budget: str | None = None
    """Most memory that an update may take, such as `16GiB` or `500MB`; what each block does with its activations is
    planned for it, in place of `policy`, to take the least time."""

    epochs: int = 4
    """Epochs, each of `updates_per_epoch`; at the end of each, the model is validated and saved."""

    updates_per_epoch: int | None = None
    """Updates of an epoch; null for as many as see as many characters as the training text has, at most 500."""

    max_updates: int | None = None
    """Updates after which to stop, in the midst of an epoch if need be; null makes all of `epochs`."""

    batch_size: int = 32
    """Windows per update, from random places of the text."""

    lr: float = 2e-3
    """Highest learning rate, of AdamW; it falls to zero along half a cosine."""

    warmup: float = 0.05
    """Share of all updates in which the learning rate first rises from zero in a line."""

    beta2: float = 0.99
    """How long AdamW remembers squared gradients."""

    weight_decay: float = 0.1
    """Decay of the weights of linear layers; embeddings, norms and biases are left alone."""

    max_grad_norm: float | None = 1.0
    """Norm to which the gradient of an update is cut; null leaves it alone."""

    val_fraction: float = 0.1
    """Share of the text, at its end, that validates instead of training."""

    val_windows: int | None = 1000
    """Most windows that validation reads, spread evenly over its text; null reads all of it."""

    precision: Precision = "32-true"
    """Arithmetic: `32-true`, or `bf16-mixed` for autocast to bfloat16."""

    device: Device = "auto"
    """Where to train; `auto` takes the GPU if there is one."""

    num_threads: int | None = None
    """Threads on the CPU; null is PyTorch's choice."""

    seed: int = 0
    """Seed of the initial weights, the windows and dropout."""

    out_dir: str | None = None
    """Folder of the run, which must not hold one yet; null takes the next free `runs/<data>_lm_<number>`."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, ("lm",))
        if self.data is not None:
            check_name("data", self.data)
        check_run_settings(self)
        for name in ("length", "depth", "dim", "num_heads", "ff_chunks", "bucket_size", "num_hashes", "block_size"):
            check_integer(name, getattr(self, name), at_least=1)
        for name in ("updates_per_epoch", "val_windows"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), at_least=1)
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"`dim` (={self.dim}) must be a multiple of twice `num_heads` (={self.num_heads}), since a head has an "
                f"even number of features; pass {self.dim + -self.dim % (2 * self.num_heads)}."
            )
        if self.block_size % 2:
            raise ValueError(f"`block_size` (={self.block_size}) must be even; pass {self.block_size + 1}.")
        check_choice("attention", self.attention, get_args(Attention))
        check_number("ff_mult", self.ff_mult, "above 0", lambda x: x > 0, "4 is usual")
        check_number("dropout", self.dropout, "from 0 to below 1", lambda x: 0 <= x < 1, "0.1 is usual")
        check_number("val_fraction", self.val_fraction, "above 0 and below 1", lambda x: 0 < x < 1, "0.1 is usual")

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `revnet train lm --config` takes."""
        save_settings(self, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no YAML mapping, or names a setting that does not exist.
        """
        return load_settings(cls, path, "revnet train lm")
