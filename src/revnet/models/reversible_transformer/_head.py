"""The head of a language model, whose weight may be the embedding."""

from torch import Tensor

from revnet.nn import CrossEntropyHead


class TiedHead(CrossEntropyHead):
    """A head that adds the two streams, so that its weight has the shape of the embedding.

    It computes the same as a head on both streams whose weight is the embedding twice.

    Args:
        in_features: Features of a token in one stream.
        num_classes: Number of different tokens.
        bias: Whether there is a bias.
        is_chunked: See `CrossEntropyHead`.

    Shape:
        x: (..., 2 * in_features). targets: (...). Output: (..., num_classes), or () with targets.
    """

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Compute the logits of `x`, or its loss."""
        return super().forward(self.rows(x), targets)

    def rows(self, x: Tensor) -> Tensor:
        """Return the sum of the two streams."""
        x1, x2 = x.chunk(2, dim=-1)
        return x1 + x2


def make_head(vocab_size: int, dim: int, num_features: int, *, bias: bool, is_tied: bool) -> CrossEntropyHead:
    """Return the head of a language model.

    Args:
        vocab_size: Number of different tokens.
        dim: Features of a token in one stream.
        num_features: Features of a token that the head gets.
        bias: Whether there is a bias.
        is_tied: Whether the weight has the shape of the embedding.
    """
    if is_tied and num_features != dim:
        return TiedHead(dim, vocab_size, bias=bias)
    return CrossEntropyHead(num_features, vocab_size, bias=bias)
