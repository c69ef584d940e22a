"""An encoder and a decoder of reversible layers.

B: batch; S: length of the source; T: length of the target; D: features of a token in one stream.
"""

from typing import Any

import torch
from torch import Tensor, nn

from revnet._checks import MOST_LAYERS, check_bool, check_count, check_counts, check_mask, check_tensor
from revnet.coupling import AbstractCoupling, Additive
from revnet.functional import rotary_table
from revnet.models._checks import check_tokens
from revnet.models.pretrained.mixin import HubMixin
from revnet.models.reversible_transformer._forms import make_form
from revnet.models.reversible_transformer._head import make_head
from revnet.models.reversible_transformer._layer_options import LayerOptions, initialize
from revnet.models.reversible_transformer._reading import look_up
from revnet.models.reversible_transformer._target_generation import GeneratesTargets
from revnet.nn import AbstractPolicy, HasGradientCheckpointing
from revnet.nn.attention.key_values import AbstractKeyValueCache, check_cache


class ReversibleEncoderDecoder(HasGradientCheckpointing, GeneratesTargets, HubMixin):
    """A reversible encoder, and a reversible decoder that attends to its output.

    The decoder's attention function is attention to earlier tokens of the target, and then to the output of the
    encoder, which all layers get as a keyword argument. Activation memory grows neither with the depth of the encoder
    nor with the depth of the decoder. Between them stay the output of the encoder and its gradient.

    Args:
        vocab_size: Number of different tokens, of source and target together. They share an embedding.
        dim: Features of a token in one stream. It is a multiple of `num_heads`, and each head has an even number of
            features.
        encoder_depth: Number of layers of the encoder.
        decoder_depth: Number of layers of the decoder.
        num_heads: Number of attention heads.
        max_length: Largest number of tokens in a source or target. No parameter depends on it.
        form: As in `ReversibleTransformer`, for encoder and decoder.
        step_size: As in `ReversibleTransformer`.
        num_kv_heads: As in `ReversibleTransformer`.
        norm: As in `ReversibleTransformer`.
        norm_eps: As in `ReversibleTransformer`.
        mlp: As in `ReversibleTransformer`.
        ff_mult: As in `ReversibleTransformer`.
        ff_chunks: As in `ReversibleTransformer`.
        bias: As in `ReversibleTransformer`.
        tie_embeddings: As in `ReversibleTransformer`.
        rope_theta: As in `ReversibleTransformer`.
        dropout: As in `ReversibleTransformer`.
        coupling: As in `ReversibleTransformer`.
        policy: As in `ReversibleTransformer`.

    Shape:
        source: (B, S), integers. tokens: (B, T), integers, the target up to its last token but one. source_mask:
        (B, S), bool, true where a token is real. targets: (B, T), integers, the token that follows each of `tokens`, or
        -100 where nothing is to be predicted. Output: logits, (B, T, vocab_size), or with `targets` a loss, ().

    Raises:
        TypeError: `policy` is not a policy, `coupling` is not a coupling, or a flag is not a bool. In the forward pass:
            tokens or a mask have another type.
        ValueError: An option is out of range, or options exclude each other. In the forward pass: a shape does not fit.

    References:
        Vaswani et al. (2017), Attention Is All You Need.
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, section 5, on translation.
    """

    is_reversible = True
    _card_task = "text"

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        encoder_depth: int,
        decoder_depth: int,
        num_heads: int,
        max_length: int = 1024,
        form: str = "coupled",
        step_size: float | None = None,
        num_kv_heads: int | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        mlp: str = "gelu",
        ff_mult: float = 4.0,
        ff_chunks: int = 1,
        bias: bool = True,
        tie_embeddings: bool = False,
        rope_theta: float = 10_000.0,
        dropout: float = 0.0,
        coupling: AbstractCoupling | None = None,
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__()
        check_counts(vocab_size=vocab_size)
        for name, depth in {"encoder_depth": encoder_depth, "decoder_depth": decoder_depth}.items():
            check_count(name, depth, most=MOST_LAYERS)
        check_bool(tie_embeddings=tie_embeddings)
        encoder, decoder = [
            LayerOptions(
                dim=dim,
                num_heads=num_heads,
                max_length=max_length,
                is_causal=is_causal,
                num_kv_heads=num_kv_heads,
                norm=norm,
                norm_eps=norm_eps,
                mlp=mlp,
                ff_mult=ff_mult,
                ff_chunks=ff_chunks,
                bias=bias,
                rope_theta=rope_theta,
                dropout=dropout,
            )
            for is_causal in (False, True)
        ]
        self._form = make_form(form, step_size, coupling, Additive())
        self.options = decoder
        self.is_reversible = form != "stored"
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.num_features = width = self._form.width_ratio * dim
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        encoder_functions = [encoder.make_functions(index) for index in range(encoder_depth)]
        self.encoder: Any = self._form.make_blocks(encoder_functions, policy)
        self.encoder_norm = encoder.make_norm(width)
        decoder_functions = [decoder.make_functions(index, context_dim=width) for index in range(decoder_depth)]
        self.decoder: Any = self._form.make_blocks(decoder_functions, policy)
        self.norm = decoder.make_norm(width)
        self.head = make_head(vocab_size, dim, width, bias=bias, is_tied=tie_embeddings)
        initialize(self.encoder, encoder_depth)
        initialize(self.decoder, decoder_depth)
        for table in (self.embedding, self.head):
            initialize(table, 1)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, source: Tensor, tokens: Tensor, source_mask: Tensor | None = None, *, targets: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of the tokens that follow `tokens`, or with `targets` their loss."""
        features = self.decode(tokens, self.encode(source, source_mask), source_mask)
        return self.head(features) if targets is None else self.head(features, targets)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Compute the output of the encoder, (B, S, num_features)."""
        check_tokens(source, most=self.max_length, name="source")
        x = self._form.enter(self.dropout(look_up(self.embedding, source, "source")))
        check_mask(source_mask, source.shape, name="source_mask")
        y = self.encoder(x, mask=source_mask, rotary=self._rotary(source.shape[1]))
        context: Tensor = self.encoder_norm(self._form.leave(y, len(self.encoder)))
        return context

    def decode(
        self,
        tokens: Tensor,
        context: Tensor,
        source_mask: Tensor | None = None,
        *,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Compute the final features of the target, (B, T, num_features).

        Args:
            tokens: Tokens of the target. With a `cache`, they follow the ones that it holds, and are added to it.
            context: Output of the encoder.
            source_mask: Which tokens of the source are real.
            cache: Keys and values of earlier tokens and of `context`; for one batch, in evaluation mode.
        """
        check_cache(cache)
        if cache is not None and self.training:
            raise ValueError(
                "`cache` must be None in training mode, in which dropout differs in each call; call `model.eval()`."
            )
        start = 0 if cache is None else cache.get_seq_length()
        check_tokens(tokens, most=self.max_length - start)
        check_tensor("context", context, hint="pass the output of `encode`")
        if context.dim() != 3 or context.shape[::2] != (tokens.shape[0], self.num_features):
            raise ValueError(
                f"`context` has shape {tuple(context.shape)}, but must have "
                f"({tokens.shape[0]}, S, {self.num_features}), the output of `encode` for the same number of rows."
            )
        check_mask(source_mask, context.shape[:2], name="source_mask")
        x = self._form.enter(self.dropout(look_up(self.embedding, tokens)))
        arguments: dict[str, Any] = {
            "context": context,
            "context_mask": source_mask,
            "rotary": self._rotary(tokens.shape[1], start=start),
        }
        if cache is not None:
            arguments["cache"] = cache
        # For the attention alone: the perceptrons take no context.
        y = self.decoder(x, f_kwargs=arguments)
        features: Tensor = self.norm(self._form.leave(y, len(self.decoder)))
        return features

    def _rotary(self, length: int, *, start: int = 0) -> Tensor:
        weight, options = self.embedding.weight, self.options
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return rotary_table(
            length, options.head_dim, start=start, base=options.rope_theta, device=weight.device, dtype=dtype
        )
