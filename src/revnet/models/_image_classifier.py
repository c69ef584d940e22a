"""What every network for images offers: its head and its feature maps, under the names that timm gave them."""

import abc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from revnet.models._checks import check_choice, check_num_classes
from revnet.nn import PolicySequential, ReversibleSequential


class AbstractImageClassifier(nn.Module, abc.ABC):
    """A network from images to logits: stem, stages, a last norm, pooling, head.

    The methods bear timm's names and mean what they mean there. A network brings the fields below, and says how the
    stem's map enters the stages, how what they return is joined to a map, what the last map goes through, and how
    weights are drawn. B C H W: batch, channels, height, width.

    References:
        Wightman (2019), PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
    """

    is_reversible: ClassVar[bool]
    """Whether the network takes a `policy`, and so has a stored twin."""
    num_classes: int
    """Size of the output; 0 where the head is the identity."""
    num_features: int
    """Channels of the final features, which the head reads."""
    feature_info: list[dict[str, Any]]
    """The maps that `forward_intermediates` returns, in order: `num_chs`, the channels; `reduction`, how many times
    smaller than the image; `module`, where the map leaves the network."""
    stem: PolicySequential
    """The way into the network: three modules at most, whose output is the first feature map, and perhaps pooling."""
    stages: nn.Sequential | ReversibleSequential
    """What runs one after another, each giving one more feature map."""
    norm: nn.Module
    head: nn.Linear | nn.Identity

    @abc.abstractmethod
    def _enter(self, x: Tensor) -> Any:
        """What the first stage reads, from what the stem returned."""

    @abc.abstractmethod
    def _join(self, y: Any) -> Tensor:
        """The map of what a stage returned."""

    @abc.abstractmethod
    def _finish(self, x: Tensor) -> Tensor:
        """The final features, from the last stage's map."""

    @abc.abstractmethod
    def _initialize(self, module: nn.Module) -> None:
        """Draw the weights of the network, or of a new head."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the final features before pooling, (B, num_features, H', W')."""
        return self._finish(self._join(self.stages(self._enter(self.stem(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool final features, and compute the logits from them.

        Args:
            x: What `forward_features` returned.
            pre_logits: Return the pooled features, (B, num_features), without the linear layer.
        """
        pooled = x.mean((-2, -1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits, (B, num_classes); without a head the pooled features, (B, num_features)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the final features, and feature maps on the way to them.

        A map may enter the loss. In a reversible network it joins the two streams into a tensor of its own, which is
        kept as long as you keep it; the stages go on from the streams, and hold what they always hold.

        Args:
            x: Images, (B, in_channels, H, W).
            indices: Which maps of `feature_info`: the last so many for a number, these for a sequence (negative ones
                count from the end), all for None. They come in the network's order.
            norm: Take the last stage's map after the final norm (and, of a convolutional network, ReLU).
            stop_early: Leave out the stages beyond the last map asked for.
            output_fmt: The layout of the maps, "NCHW".
            intermediates_only: Return the maps alone.

        Returns:
            The final features, and the list of maps. Where `stop_early` left out stages, the last map stands in for the
            final features.

        Raises:
            ValueError: There is no such map, or no such layout.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        wanted = _select(indices, len(self.feature_info))
        last = len(self.stages)
        num_stages = max(wanted) if stop_early else last

        if 0 in wanted and len(self.stem) > 3:  # The map lies within the stem, which therefore cannot run as one.
            y = self.stem[:3](x)
            maps, y = [y], self.stem[3:](y)
        else:
            y = self.stem(x)
            maps = [y] if 0 in wanted else []
        streams = self._enter(y)
        # Reversible stages between two maps run as one, so that only the maps are kept.
        for start, stop in pairwise(sorted({0, *wanted, num_stages})):
            streams = self.stages[start:stop](streams)
            if stop in wanted:
                maps.append(self._join(streams))

        if num_stages < last:
            features = maps[-1]
        elif not intermediates_only or (norm and last in wanted):
            features = self._finish(maps[-1] if last in wanted else self._join(streams))
            if norm and last in wanted:
                maps[-1] = features
        return maps if intermediates_only else (features, maps)

    def get_classifier(self) -> nn.Linear | nn.Identity:
        """The head: what turns pooled features into logits."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one, drawn as the first was, on the device and in the dtype of the old.

        Make the optimizer afterwards: one made before still holds the old head.

        Args:
            num_classes: Size of the output; 0 for the identity.
        """
        check_num_classes(num_classes)
        old = self.head.weight if isinstance(self.head, nn.Linear) else next(self.parameters())
        head = make_head(self.num_features, num_classes)
        self._initialize(head)
        self.head = head.to(old.device, old.dtype).train(self.training)
        self.num_classes = num_classes


def make_head(num_features: int, num_classes: int) -> nn.Linear | nn.Identity:
    """The layer behind the pooling: linear, or nothing for 0 classes."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def _select(indices: int | Sequence[int] | None, num_maps: int) -> set[int]:
    """The maps that `indices` means, counted from 0."""
    if indices is None:
        return set(range(num_maps))
    if isinstance(indices, int):
        if not 1 <= indices <= num_maps:
            raise ValueError(
                f"`indices` (={indices}) must be from 1 to {num_maps}, the number of feature maps; for one map pass "
                f"a list, [{indices}]."
            )
        return set(range(num_maps - indices, num_maps))
    chosen = list(indices)
    if not chosen or not all(isinstance(index, int) and -num_maps <= index < num_maps for index in chosen):
        raise ValueError(
            f"`indices` (={indices!r}) must name one or more of the {num_maps} feature maps, from 0 to {num_maps - 1}; "
            "`feature_info` lists them."
        )
    return {index % num_maps for index in chosen}
