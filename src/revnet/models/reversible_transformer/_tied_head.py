"""A head whose weight is the embedding."""

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
