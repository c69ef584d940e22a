"""Caches of keys and values of transformers, in the reversible language model."""

from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from revnet._checks import describe
from revnet.functional._rotary import table_of
from revnet.models import ReversibleTransformer
from revnet.nn.attention.key_values import check_cache
from revnet.transformers._padding import check_padding_mask, find_positions

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""Name of the cache in outputs, which changed in transformers 5.24."""


class ReadsCaches:
    """The part of `ReversibleTransformerForCausalLM` that keeps keys and values."""

    transformer: ReversibleTransformer
    """The network."""
    training: bool
    """Whether the model is in training mode."""

    @property
    def _has_cache(self) -> bool:
        return self.transformer.options.attention == "full"

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next step of `generate`: the new tokens, or without a cache all tokens.

        Raises:
            ValueError: A row ends with padding, so that new tokens would follow it.
        """
        parent = cast("Any", super())
        mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
        is_first = cache is None or cache.get_seq_length() == 0
        if is_first and isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask[:, -1] != 0).all()):
            raise ValueError(
                "`attention_mask` must be 1 at the end of each row, since `generate` continues the last token; pad the "
                "prompts on the left, with `tokenizer.padding_side = 'left'`."
            )
        if cache is not None:
            own: dict[str, Any] = parent.prepare_inputs_for_generation(
                input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
            )
            return own
        if inputs_embeds is not None and input_ids.shape[1]:
            # Without a cache, the embeddings of the prompt are needed in every step.
            embedding = self.transformer.embedding
            inputs_embeds = torch.cat((inputs_embeds, embedding(input_ids)), dim=1)
        kwargs["is_first_iteration"] = inputs_embeds is not None or kwargs.get("is_first_iteration", False)
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Make a cache, if the attention can use one."""
        if not self._has_cache and model_kwargs.get(CACHE) is None:
            return None
        return cast("Any", super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True

    def _choose_cache(self, cache: Any, use_cache: bool | None) -> Any:
        """Return the cache of a forward pass: the given one, a new one, or None.

        Raises:
            TypeError: `cache` is not a cache that grows.
            ValueError: `cache` is passed in training mode, while gradients are enabled, or with another attention.
        """
        if cache is None:
            is_new = bool(use_cache) and self._has_cache and not self.training and not torch.is_grad_enabled()
            return DynamicCache() if is_new else None
        if not isinstance(cache, Cache) or getattr(cache, "is_compileable", False):
            raise TypeError(
                f"`{CACHE}` (={describe(cache)}) must be a `DynamicCache` of transformers; other caches are not "
                "supported."
            )
        self.transformer.check_cacheable()
        if self.training:
            raise ValueError(f"`{CACHE}` must be left out in training mode; call `model.eval()`.")
        check_cache(cache)
        return cache

    def _read_with_cache(
        self,
        x: Any,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Compute the final features of new tokens, (B, T, num_features), and add them to the cache.

        Args:
            x: Input of the blocks.
            shape: (B, T).
            attention_mask: (B, P + T), for P tokens in the cache.
            position_ids: (B, T) or (1, T).
            cache: The cache.
        """
        B, T = shape
        if attention_mask is None:
            attention_mask = torch.ones(B, cache.get_seq_length() + T, dtype=torch.int64)
        check_padding_mask(attention_mask, (B, cache.get_seq_length() + T))
        found = find_positions(attention_mask, position_ids, T)
        model = self.transformer
        if found is None:
            return model.run_blocks(x, cache=cache)
        mask, positions = found
        dtype = torch.float64 if model.embedding.weight.dtype == torch.float64 else torch.float32
        options = model.options
        rotary = table_of(positions[:, None].to(dtype), options.head_dim, options.rope_theta)
        return model.run_blocks(x, mask=mask, rotary=rotary, cache=cache)
