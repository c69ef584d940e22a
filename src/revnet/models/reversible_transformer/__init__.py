"""Reversible transformers for sequences of tokens: language models and encoders.

Embedded tokens enter two residual streams. Attention reads the second stream and adds to the first, and a perceptron
reads the first and adds to the second. At the end the streams are concatenated, normalized and mapped to logits. This
is the structure of the Reformer, whose published code is in google/trax; other forms of the network are options. There
are three kinds of attention: full, locality-sensitive hashing (Reformer) and hierarchical (H-Transformer-1D). Positions
are rotary: they rotate queries and keys, and are not added to the streams.

References:
    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
    Zhu, Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences.
    Su et al. (2021), RoFormer: Enhanced Transformer with Rotary Position Embedding.
"""

from revnet.models.reversible_transformer._encoder_decoder import ReversibleEncoderDecoder as ReversibleEncoderDecoder
from revnet.models.reversible_transformer._head import TiedHead as TiedHead
from revnet.models.reversible_transformer._network import ReversibleTransformer as ReversibleTransformer
from revnet.models.reversible_transformer._residuals import AttentionResidual as AttentionResidual
from revnet.models.reversible_transformer._residuals import FeedForward as FeedForward
from revnet.models.reversible_transformer._residuals import LayerResidual as LayerResidual
from revnet.models.reversible_transformer._sizes import h_transformer_base as h_transformer_base
from revnet.models.reversible_transformer._sizes import h_transformer_large as h_transformer_large
from revnet.models.reversible_transformer._sizes import h_transformer_small as h_transformer_small
from revnet.models.reversible_transformer._sizes import reformer_enwik8 as reformer_enwik8
