"""The config of the reversible language model."""

from typing import ClassVar

import torch
from transformers import PreTrainedConfig

from revnet.coupling import Additive, FixedPoint
from revnet.models import ReversibleTransformer
from revnet.models.reversible_transformer import TiedHead

_OF_LAYERS = (
    *("dim", "num_heads", "num_kv_heads", "attention", "bucket_size", "num_hashes", "block_size", "norm", "norm_eps"),
    *("mlp", "ff_mult", "ff_chunks", "bias", "rope_theta", "dropout"),
)
"""Arguments of `ReversibleTransformer` for its layers, which entries of the config have the names of."""
_COUPLINGS: dict[str, type[Additive] | type[FixedPoint]] = {"additive": Additive, "fixed_point": FixedPoint}


class ReversibleTransformerConfig(PreTrainedConfig):
    """Config of a reversible language model: the arguments of `ReversibleTransformer`, and three of this class.

    transformers' usual names `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads` and
    `rms_norm_eps` also work.

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
        "num_key_value_heads": "num_kv_heads",
        "rms_norm_eps": "norm_eps",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

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
    form: str = "coupled"
    """How the residuals are combined: "coupled", "midpoint", "leapfrog" or "stored"."""
    step_size: float | None = None
    """Step size of the midpoint or the leapfrog form; None for the default of `ReversibleTransformer`."""
    num_kv_heads: int | None = None
    """Number of heads of the keys and values; None for `num_heads`."""
    norm: str = "layer"
    """Kind of norm: "layer" or "rms"."""
    norm_eps: float = 1e-5
    """Value that the norms add to the variance."""
    mlp: str = "gelu"
    """Kind of perceptron: "gelu" or "swiglu"."""
    bias: bool = True
    """Whether perceptrons, layer norms and the head have biases."""
    rope_theta: float = 10_000.0
    """Base of the frequencies of the rotary positions."""
    coupling: str | None = None
    """Coupling of the blocks: "additive" or "fixed_point"; None for the default of `ReversibleTransformer`."""
    policy: str = "reverse"
    """Policy of a new model: "reverse", "checkpoint", "offload" or "store". In the stored form, "reverse" stands for
    "store"."""
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
        is_default = self.form == "stored" and self.policy == "reverse"
        model = ReversibleTransformer(
            vocab_size=self.vocab_size,
            depth=self.depth,
            max_length=self.max_position_embeddings,
            form=self.form,
            step_size=self.step_size,
            tie_embeddings=self.tie_word_embeddings,
            coupling=None if self.coupling is None else _COUPLINGS[self.coupling](),
            policy=None if is_default else self.policy,
            **{name: getattr(self, name) for name in _OF_LAYERS},
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
    options = model.options
    config = ReversibleTransformerConfig(
        vocab_size=model.embedding.num_embeddings,
        depth=len(model.blocks),
        max_position_embeddings=model.max_length,
        form=model.form,
        step_size=model.step_size,
        chunked_loss=model.head.is_chunked,
        tie_word_embeddings=isinstance(model.head, TiedHead) or model.head.weight is model.embedding.weight,
        **{name: getattr(options, name) for name in _OF_LAYERS},
    )
    config.coupling = _coupling_of(model, config)
    return config


def _coupling_of(model: ReversibleTransformer, config: ReversibleTransformerConfig) -> str | None:
    """Return the name of the coupling of `model`, all of whose blocks have the same.

    Raises:
        ValueError: A config cannot describe it.
    """
    if config.form == "stored":
        return None
    actual = [block.coupling for block in model.blocks]
    for name in _COUPLINGS:
        config.coupling = name
        with torch.device("meta"):
            expected = [block.coupling for block in config.make_transformer().blocks]
        if repr(actual) == repr(expected):
            return name
    raise ValueError(
        f"`model` has the coupling {actual[0]}, but a config has `Additive()` or `FixedPoint()`, or the same with the "
        "step size of the form."
    )


def check_same_parts(model: ReversibleTransformer, described: ReversibleTransformer) -> None:
    """Raise unless the modules of `model` have the classes and the sizes that its config describes.

    Args:
        model: The network.
        described: The network that its config makes.

    Raises:
        ValueError: A module or a parameter differs.
    """
    expected = {name: type(module) for name, module in described.named_modules()}
    for name, module in model.named_modules():
        if type(module) is not expected.get(name):
            raise ValueError(f"`model` has a {type(module).__name__} as `{name}`, which a config cannot describe.")
    shapes = {name: tuple(parameter.shape) for name, parameter in described.named_parameters()}
    for name, parameter in model.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            raise ValueError(
                f"`model` has a parameter `{name}` of shape {tuple(parameter.shape)}, which a config cannot describe."
            )
