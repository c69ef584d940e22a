"""What `convert` did: which blocks are converted, and which are not."""

from dataclasses import dataclass, field

from revnet.conversion._methods import AbstractMethod


@dataclass(frozen=True)
class ConversionReport:
    """The blocks that `convert` was given, which prints as a short text.

    Example:
        >>> from torch import nn
        >>> from revnet.conversion import Dr2Net, convert
        >>> class Block(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> print(convert(nn.Sequential(*[Block(2, 2) for _ in range(3)]), Dr2Net()))
        converted 3 of 3 blocks by Dr2Net(alpha=1.0, beta=0.0): 0, 1, 2
    """

    method: AbstractMethod | None
    """The method; None for a conversion back."""
    converted: tuple[str, ...]
    """Names of the blocks that were converted, or converted back."""
    left: dict[str, str] = field(default_factory=dict)
    """Reasons why the other blocks stay as they are, by name."""

    def __str__(self) -> str:
        total = len(self.converted) + len(self.left)
        how = "back" if self.method is None else f"{len(self.converted)} of {total} blocks by {self.method}"
        lines = [f"converted {how}: {', '.join(self.converted) or 'none'}"]
        return "\n".join([*lines, *[f"left {name} as it is: {reason}" for name, reason in self.left.items()]])
