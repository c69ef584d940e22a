"""The reversible language model as a `PreTrainedModel`."""

import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithPast

from revnet._checks import check_count
from revnet.functional import linear_cross_entropy
from revnet.models import ReversibleTransformer
from revnet.models.reversible_transformer import TiedHead
from revnet.models.reversible_transformer._layer_options import ends_of_residuals
from revnet.nn import CrossEntropyHead
from revnet.transformers._activation_checkpointing import ActivationCheckpointing
from revnet.transformers._causal_lm_config import ReversibleTransformerConfig, check_same_parts, config_of
from revnet.transformers._padding import find_order
from revnet.transformers._reads_caches import CACHE, ReadsCaches
from revnet.transformers._run_folder import read_run, write_weights
from revnet.transformers._token_tables import TokenTables

_DEVIATION = 0.02
"""Standard deviation of the initial weights."""
_LOSS_OPTIONS = {"num_items_in_batch", "shift_labels", "ignore_index"}
_IGNORE = -100


class ReversibleTransformerForCausalLM(
    ActivationCheckpointing, TokenTables, ReadsCaches, PreTrainedModel, GenerationMixin
):
    """A reversible language model for `Trainer`, `generate` and the other tools of transformers.

    `AutoModelForCausalLM.from_config(config)` makes one. Its blocks have the policy `config.policy`, by default
    `Reverse()`: activation checkpointing is on from the start. `activation_checkpointing_disable()`, also named
    `gradient_checkpointing_disable()`, makes the stored twin, and `activation_checkpointing_enable()` reverses again.

    The attribute `transformer` is the `ReversibleTransformer`. `from_transformer` wraps an existing one, and `from_run`
    loads one that `revnet train lm` has trained.

    `generate` keeps keys and values in a `DynamicCache` of transformers, unless `use_cache` is False. LSH and
    hierarchical attention have no cache: `generate` computes all tokens again for each new one. Sequences that are
    packed into one row are refused.

    Args:
        config: The config.

    Shape:
        input_ids: (B, T), integers. attention_mask: (B, T), 1 where a token is real and 0 where it is padding, on any
        side. labels: (B, T), integers, -100 where nothing is to be predicted; the model shifts them. Logits: (B, T,
        vocab_size).

    Raises:
        TypeError, ValueError: An entry of the config is not valid.
    """

    config_class = ReversibleTransformerConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules: ClassVar[list[str]] = ["ReversibleBlock"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"transformer.head.weight": "transformer.embedding.weight"}
    _supports_sdpa = True

    def __init__(self, config: ReversibleTransformerConfig) -> None:
        super().__init__(config)
        check_count("max_position_embeddings", config.max_position_embeddings)
        self.transformer = config.make_transformer()
        self.post_init()

    @classmethod
    def from_transformer(cls, model: ReversibleTransformer) -> Self:
        """Wrap a network. The new model holds `model` itself, not a copy.

        Raises:
            TypeError: `model` is not a `ReversibleTransformer`.
            ValueError: The network is an encoder, or has a part that a config cannot describe.
        """
        if not isinstance(model, ReversibleTransformer):
            raise TypeError(f"`model` (={type(model).__name__}) must be a `ReversibleTransformer`.")
        config = config_of(model)
        with torch.device("meta"):
            wrapped = cls(config)
        check_same_parts(model, wrapped.transformer)
        wrapped.transformer = model
        wrapped.config.dtype = model.embedding.weight.dtype
        wrapped.train(model.training)
        wrapped.tie_weights()
        return wrapped

    @classmethod
    def from_run(cls, path: str | Path) -> Self:
        """Load a model that `revnet train lm` has trained. `config.characters` has its vocabulary.

        Args:
            path: Folder of a run, or a `.safetensors` or `.ckpt` file.

        Raises:
            CheckpointError: The file does not exist, is truncated, or holds another kind of model.
        """
        language_model = read_run(path)
        wrapped = cls.from_transformer(language_model.model)
        wrapped.config.characters = language_model.header.characters
        return wrapped

    def save_weights(self, path: str | Path) -> None:
        """Write a weights file that `revnet generate` and `load_language_model` read.

        Args:
            path: File to write, with the ending `.safetensors`.

        Raises:
            ValueError: The config does not have a character for each token of the model, or the weights are tied.
        """
        write_weights(self.transformer, self.config, Path(path))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_options: Any,
    ) -> "CausalLMOutput | tuple[Any, ...]":
        """Compute the logits and, with labels, the loss.

        With a cache, named `past_key_values` before transformers 5.24, the tokens follow the ones that it holds. With
        `use_cache`, the output has a new cache; in training mode this has no effect. The number of labels in all
        batches of an update, `num_items_in_batch`, divides the sum of the losses if it is given, as in the models of
        transformers.
        """
        cache = self._choose_cache(cache if past_key_values is None else past_key_values, use_cache)
        _refuse(output_attentions=output_attentions or None, output_hidden_states=output_hidden_states or None)
        unknown = loss_options.keys() - _LOSS_OPTIONS
        if unknown:
            raise TypeError(f"`{min(unknown)}` is not an argument of {type(self).__name__}; leave it out.")
        features = self._features(input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if labels is not None and labels.shape != features.shape[:2]:
            raise ValueError(f"`labels` has shape {tuple(labels.shape)}, but must have {tuple(features.shape[:2])}.")
        if labels is not None and attention_mask is not None and "shift_labels" not in loss_options:
            # Padding on the left would predict the first token, which it has seen, since it is moved behind it.
            shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORE)
            loss_options["shift_labels"] = shifted.masked_fill(attention_mask == 0, _IGNORE)
        loss = logits = None
        head = self.transformer.head
        if labels is not None and self.training and isinstance(head, CrossEntropyHead) and head.is_chunked:
            loss = _chunked_loss(features, head, labels, **loss_options)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head(features[:, kept])
            if labels is not None:
                loss = _full_loss(self, logits, labels, loss_options)
        output = CausalLMOutput(loss=loss, logits=logits)
        if cache is not None:
            output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _features(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Compute the final features of each token, (B, T, num_features)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either `input_ids` or `inputs_embeds`.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        if given.dim() < 2:
            raise ValueError(f"`input_ids` has shape {tuple(given.shape)}, but must have (B, T).")
        B, T = given.shape[:2]
        model = self.transformer
        num_cached = 0 if cache is None else cache.get_seq_length()
        if model.max_length < num_cached + T:
            name = "input_ids" if inputs_embeds is None else "inputs_embeds"
            raise ValueError(
                f"`{name}` has {num_cached + T} positions, more than `max_position_embeddings` (={model.max_length}); "
                "pass fewer, or build the model with a larger value."
            )
        embed = model.embed if inputs_embeds is None else model.enter
        if cache is not None:
            return self._read_with_cache(embed(given), (B, T), attention_mask, position_ids, cache)
        order = find_order(attention_mask, position_ids, (B, T))
        if order is not None:
            given = order.move(given)
        features = model.run_blocks(embed(given))
        return features if order is None else order.move_back(features)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module with parameters as `ReversibleTransformer` does."""
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if not isinstance(module, nn.Linear | nn.Embedding):
            return
        blocks = self.transformer.blocks
        is_end = any(module is layer for layer in ends_of_residuals(blocks))
        nn.init.normal_(module.weight, std=_DEVIATION / math.sqrt(2 * len(blocks)) if is_end else _DEVIATION)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _full_loss(model: PreTrainedModel, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the loss of all logits."""
    if logits.shape[:2] != labels.shape:
        raise ValueError("`logits_to_keep` must be left out with `labels`, whose loss needs all logits.")
    try:
        loss: Tensor = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
    except IndexError:  # raised on the CPU
        raise ValueError(
            f"`labels` must be from 0 to {logits.shape[-1] - 1}, or {_IGNORE} where nothing is to be predicted, "
            f"but range up to {labels.max()}; build the model with a larger `vocab_size`."
        ) from None
    return loss


def _chunked_loss(
    features: Tensor,
    head: CrossEntropyHead,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = _IGNORE,
) -> Tensor:
    """Return the loss of the next tokens, without all logits at once."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    loss = linear_cross_entropy(
        head.rows(features) if isinstance(head, TiedHead) else features,
        head.weight,
        shift_labels,
        bias=head.bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"`{name}` is not supported by this model; leave it out.")
