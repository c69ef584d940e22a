"""A language model or an encoder of reversible layers.

B T: batch and length of the tokens; D: features of a token in one stream; P: tokens in a cache.
"""

from torch import Tensor, nn

from revnet._checks import MOST_LAYERS, check_bool, check_count, check_counts
from revnet.coupling import AbstractCoupling, Additive, FixedPoint
from revnet.models.pretrained.mixin import HubMixin
from revnet.models.reversible_transformer._forms import make_form
from revnet.models.reversible_transformer._generation import GeneratesTokens
from revnet.models.reversible_transformer._head import make_head
from revnet.models.reversible_transformer._layer_options import LayerOptions, initialize
from revnet.nn import AbstractPolicy, HasGradientCheckpointing
from revnet.nn.attention.key_values import AbstractKeyValueCache


class ReversibleTransformer(HasGradientCheckpointing, GeneratesTokens, HubMixin):
    """A reversible transformer: a language model, or with `is_causal=False` an encoder.

    Args:
        vocab_size: Number of different tokens.
        dim: Features of a token in one stream. It is a multiple of `num_heads`, and each head has an even number of
            features.
        depth: Number of layers.
        num_heads: Number of attention heads.
        max_length: Largest number of tokens in a sequence, and the number of tokens that `generate` looks back. No
            parameter depends on it. LSH attention has buckets for this number.
        is_causal: Whether a token sees only itself and earlier tokens, as in a decoder, or all, as in an encoder.
        form: How the residuals are combined. "coupled": attention and perceptron update one stream each. "midpoint" and
            "leapfrog": the residual of a whole layer is added to the outputs of the last two layers. "stored": an
            ordinary transformer, which is not reversible and needs memory for each layer.
        step_size: Step size of the midpoint form, by default 1/2, or of the leapfrog form, by default 1.
        num_kv_heads: Number of heads of the keys and values (grouped-query attention). It divides `num_heads`, which is
            the default. Not for LSH attention.
        attention: "full" has a cost that grows with the square of the length. "lsh", as in the Reformer, attends among
            tokens that random rotations put into one bucket. "hierarchical", as in H-Transformer-1D, sees far tokens in
            groups.
        bucket_size: Average number of tokens per bucket in LSH attention, in a sequence of `max_length`.
        num_hashes: Number of hashing rounds in LSH attention.
        block_size: Tokens per block in hierarchical attention, an even number.
        norm: "layer" for `nn.LayerNorm`, "rms" for `nn.RMSNorm`.
        norm_eps: Value that the norms add to the variance.
        mlp: "gelu" for perceptrons with a GELU, "swiglu" for gated ones.
        ff_mult: Hidden width of the perceptrons, as a multiple of `dim`. With "swiglu", 8/3 gives the parameters of
            "gelu" at 4.
        ff_chunks: Number of chunks of tokens on which the perceptrons run one after the other. The hidden layer gets
            smaller by this factor, and is computed once more in the backward pass.
        bias: Whether perceptrons, layer norms and the head have biases. The attention has none.
        tie_embeddings: Whether the weight of the head is the embedding; for both streams in the coupled form.
        rope_theta: Base of the frequencies of the rotary positions.
        dropout: Share of features dropped after the embedding and from each residual.
        coupling: How residuals are combined with the streams. The default is `Additive()`, and for LSH attention
            `FixedPoint()`: a token that lies between two buckets must be rebuilt to the last bit, so that it falls into
            the same bucket again. In the midpoint and leapfrog forms, `FixedPoint()` makes the reversal exact, too.
        policy: Policy for the activations of the layers, or its name. The default is `Reverse()`, and `Store()` for the
            stored form. `Store()` makes the stored twin.

    Shape:
        tokens: (B, T), integers. mask: (B, T), true where a token is real, or as in `FullAttention`. targets: (B, T),
        integers, -100 where nothing is to be predicted. Output: logits, (B, T, vocab_size), or with `targets` a loss,
        (). With a `cache` of P tokens: tokens (B, T) follow them, and mask is (B, P + T).

    Numerics:
        Under autocast the streams stay in float32, so that they can be rebuilt, and the residual functions compute in
        low precision. In float32, `blocks.inverse` restores the embedded tokens to 6e-8 after 12 new blocks. On the
        fixed-point grid it restores them exactly, once the embedding has been rounded to the grid by at most 2^-15.

    Raises:
        TypeError: `policy` is not a policy, `coupling` is not a coupling, or a flag is not a bool. In the forward pass:
            `tokens` or `mask` has another type.
        ValueError: No form, attention, norm, perceptron or policy has this name, a count is not positive, `dropout` is
            not from 0 to below 1, `dim` is not a multiple of `num_heads`, a head has an odd number of features, or two
            options exclude each other. In the forward pass: `tokens`, `mask` or `targets` has another shape, or
            `cache` is passed in training mode or while gradients are enabled.

    References:
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
        Touvron et al. (2023), LLaMA: Open and Efficient Foundation Language Models.
    """

    is_reversible = True
    _card_task = "text"

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        max_length: int = 1024,
        is_causal: bool = True,
        form: str = "coupled",
        step_size: float | None = None,
        num_kv_heads: int | None = None,
        attention: str = "full",
        bucket_size: int = 64,
        num_hashes: int = 4,
        block_size: int = 64,
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
        check_count("depth", depth, most=MOST_LAYERS)
        check_bool(tie_embeddings=tie_embeddings)
        options = LayerOptions(
            dim=dim,
            num_heads=num_heads,
            max_length=max_length,
            is_causal=is_causal,
            num_kv_heads=num_kv_heads,
            attention=attention,
            bucket_size=bucket_size,
            num_hashes=num_hashes,
            block_size=block_size,
            norm=norm,
            norm_eps=norm_eps,
            mlp=mlp,
            ff_mult=ff_mult,
            ff_chunks=ff_chunks,
            bias=bias,
            rope_theta=rope_theta,
            dropout=dropout,
        )
        self._form = make_form(form, step_size, coupling, FixedPoint() if attention == "lsh" else Additive())
        self.options = options
        self.form = form
        self.step_size = step_size
        self.is_reversible = form != "stored"
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.is_causal = is_causal
        self.num_features = self._form.width_ratio * dim
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = self._form.make_blocks([options.make_functions(index) for index in range(depth)], policy)
        self.norm = options.make_norm(self.num_features)
        self.head = make_head(vocab_size, dim, self.num_features, bias=bias, is_tied=tie_embeddings)
        initialize(self, depth)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Compute the logits of the next token (in an encoder, of the token itself), or with `targets` their loss.

        With a `cache`, the tokens follow the ones that it holds, and are added to it.
        """
        features = self.forward_features(tokens, mask, cache=cache)
        return self.head(features) if targets is None else self.head(features, targets)
