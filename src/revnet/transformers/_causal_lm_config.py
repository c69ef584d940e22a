"""The config of the reversible language model."""

from typing import ClassVar

from torch import nn
from transformers import PreTrainedConfig

from revnet.coupling import Additive, FixedPoint
from revnet.models import ReversibleTransformer
from revnet.models.reversible_transformer import AttentionResidual, FeedForward
from revnet.nn import ReversibleBlock
from revnet.nn.attention import FullAttention, HierarchicalAttention, LSHAttention

_COUPLINGS: dict[str, type[Additive] | type[FixedPoint]] = {"additive": Additive, "fixed_point": FixedPoint}


class ReversibleTransformerConfig(PreTrainedConfig):
    """Config of a reversible language model: the arguments of `ReversibleTransformer`, and three of this class.

    transformers' usual names `hidden_size`, `num_hidden_layers` and `num_attention_heads` also work.

    Example:
        >>> import revnet.transformers
        >>> from transformers import AutoModelForCausalLM
        >>> config = revnet.transformers.ReversibleTransformerConfig(
        ...     vocab_size=100, dim=16, depth=2, num_heads=2
        ... )
        >>> AutoModelForCausalLM.from_config(config).num_parameters()
        10824
    """

    model_type: ClassVar[str] = "reversible_transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = []

    vocab_size: int = 50_257
    """Number of different tokens."""
    dim: int = 384
    """Features of a token in each of the two streams."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 6
    """Number of attention heads."""
    max_position_embeddings: int = 1024
    """Largest number of tokens in a sequence. No parameter depends on it."""
    attention: str = "full"
    """Kind of attention: "full", "lsh" or "hierarchical"."""
    bucket_size: int = 64
    """Average number of tokens per bucket in LSH attention."""
    num_hashes: int = 4
    """Number of hashing rounds in LSH attention."""
    block_size: int = 64
    """Tokens per block in hierarchical attention."""
    ff_mult: float = 4.0
    """Hidden width of the perceptrons, as a multiple of `dim`."""
    ff_chunks: int = 1
    """Number of chunks of tokens on which the perceptrons run one after the other."""
    dropout: float = 0.0
    """Share of features dropped after the embedding and from each residual."""
    coupling: str | None = None
    """Coupling of the blocks: "additive" or "fixed_point"; None for the default of `ReversibleTransformer`."""
    policy: str = "reverse"
    """Policy of a new model: "reverse", "checkpoint", "offload" or "store"."""
    chunked_loss: bool = False
    """Whether the loss works on some rows of logits at a time in training. The output then has no logits."""
    tie_word_embeddings: bool = False
    """Whether the head uses the embedding as its weight, once for each stream."""
    characters: str | None = None
    """Characters that the tokens stand for, in a model that `revnet train lm` has trained."""

    def make_transformer(self) -> ReversibleTransformer:
        """Return the network with new weights.

        Raises:
            TypeError, ValueError: An entry of the config is not valid.
        """
        if self.coupling is not None and self.coupling not in _COUPLINGS:
            raise ValueError(f"`coupling` (={self.coupling!r}) must be 'additive' or 'fixed_point', or None.")
        model = ReversibleTransformer(
            vocab_size=self.vocab_size,
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            max_length=self.max_position_embeddings,
            attention=self.attention,
            bucket_size=self.bucket_size,
            num_hashes=self.num_hashes,
            block_size=self.block_size,
            ff_mult=self.ff_mult,
            ff_chunks=self.ff_chunks,
            dropout=self.dropout,
            coupling=None if self.coupling is None else _COUPLINGS[self.coupling](),
            policy=self.policy,
        )
        model.head.is_chunked = self.chunked_loss
        return model


def config_of(model: ReversibleTransformer) -> ReversibleTransformerConfig:
    """Return the config that makes a network like `model`.

    Raises:
        ValueError: The network is an encoder, or has a part that the config cannot describe.
    """
    if not model.is_causal:
        raise ValueError("`model` is an encoder (`is_causal=False`), and a causal language model cannot be one.")
    block = model.blocks[0]
    assert isinstance(block, ReversibleBlock)
    f, g = block.f, block.g
    assert isinstance(f, AttentionResidual)
    assert isinstance(g, FeedForward)
    attention, hidden = f.attention, g.layers[-1]
    assert isinstance(hidden, nn.Linear)
    names = {repr(kind()): name for name, kind in _COUPLINGS.items()}
    coupling = names.get(repr(block.coupling))
    if coupling is None:
        raise ValueError(f"`model` has the coupling {block.coupling}, but a config has `Additive()` or `FixedPoint()`.")
    dim = model.embedding.embedding_dim
    options: dict[str, object] = {}
    match attention:
        case FullAttention():
            options = {"attention": "full"}
        case LSHAttention():
            options = {
                "attention": "lsh",
                "bucket_size": attention.bucket_size,
                "num_hashes": attention.num_hashes,
            }
        case HierarchicalAttention():
            options = {"attention": "hierarchical", "block_size": attention.block_size}
        case _:
            raise ValueError(f"`model` has the attention {type(attention).__name__}, which a config cannot describe.")
    return ReversibleTransformerConfig(
        vocab_size=model.embedding.num_embeddings,
        dim=dim,
        depth=len(model.blocks),
        num_heads=attention.num_heads,
        max_position_embeddings=model.max_length,
        ff_mult=hidden.in_features / dim,
        ff_chunks=g.num_chunks,
        dropout=model.dropout.p,
        coupling=coupling,
        chunked_loss=model.head.is_chunked,
        **options,
    )
