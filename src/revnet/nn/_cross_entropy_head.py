"""The last layer of a classifier or a language model, with its loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnet._checks import MOST_CHANNELS, check_bool, check_count
from revnet.functional import linear_cross_entropy
from revnet.functional._linear_cross_entropy import check_features, check_rows, target_error


class CrossEntropyHead(nn.Linear):
    """A linear layer that returns logits, or with targets the mean cross-entropy.

    If it is chunked, the logits of a loss exist for some rows of `x` at a time, as in
    `revnet.functional.linear_cross_entropy`; the gradients are equal up to rounding. `revnet.memory.plan` can choose
    this for a budget.

    *Memory:* the ordinary loss needs several tensors as large as the logits. The chunked one needs a part of one, but
    holds the gradient of its weight during the whole backward pass.

    *Time:* the matrix products are the same.

    Args:
        in_features: Features of a row.
        num_classes: Number of classes, such as the vocabulary.
        bias: Whether there is a bias.
        is_chunked: Whether the logits of a loss are divided into chunks. By default, they are if there are more classes
            than features, so that the logits are larger than `x`. The attribute of this name may be changed.

    Shape:
        x: (..., in_features). targets: (...), integers from 0 to `num_classes - 1`, or -100 for rows that do not count.
        Output: (..., num_classes), or () with targets. The loss is in float32 if `x` has a lower precision.

    Raises:
        TypeError: `bias` or `is_chunked` is not a bool.
        ValueError: A count is not a positive integer. In the forward pass: `x` or `targets` has another shape, or a
            target is not a class.

    Example:
        >>> import torch
        >>> from revnet.nn import CrossEntropyHead
        >>> head = CrossEntropyHead(16, 50_000)
        >>> features, targets = torch.randn(2, 10, 16), torch.randint(50_000, (2, 10))
        >>> head(features).shape
        torch.Size([2, 10, 50000])
        >>> head(features, targets).shape
        torch.Size([])
    """

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = True, is_chunked: bool | None = None
    ) -> None:
        check_count("in_features", in_features, most=MOST_CHANNELS)
        check_count("num_classes", num_classes)
        check_bool(bias=bias)
        if is_chunked is not None:
            check_bool(is_chunked=is_chunked)
        super().__init__(in_features, num_classes, bias=bias)
        self.is_chunked = num_classes > in_features if is_chunked is None else is_chunked

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Compute the logits of `x`, or its loss."""
        if targets is None:
            check_features(x, self.weight)
            return super().forward(x)
        if self.is_chunked:
            return linear_cross_entropy(x, self.weight, targets, bias=self.bias)
        check_rows(x, self.weight, targets, self.bias)
        logits = super().forward(x).reshape(-1, self.out_features)
        precise = torch.promote_types(logits.dtype, torch.float32)
        try:
            return F.cross_entropy(logits.to(precise), targets.flatten().long())
        except (IndexError, RuntimeError) as error:  # raised on the CPU, the second by `torch.func.vmap`
            if "out of bounds" not in str(error):
                raise
            raise target_error(targets, self.out_features) from None

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"{super().extra_repr()}, is_chunked={self.is_chunked}"


def cross_entropy_heads(model: nn.Module) -> list[CrossEntropyHead]:
    """Return the layers of `model` that compute a loss from logits."""
    return [module for module in model.modules() if isinstance(module, CrossEntropyHead)]
