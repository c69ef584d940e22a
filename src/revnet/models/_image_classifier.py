"""The interface of image classifiers: head and feature maps, with timm's names."""

import abc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from revnet._checks import check_bool, check_choice, describe, is_integer
from revnet.models._checks import check_images, check_num_classes, explain_input_errors
from revnet.models.pretrained.mixin import HubMixin
from revnet.nn import PolicySequential, ReversibleSequential


class AbstractImageClassifier(nn.Module, HubMixin, abc.ABC):
    """A network from images to logits: stem, stages, final norm, pooling and head.

    The methods have the names and meanings of timm's methods. A subclass sets the fields below. It defines how the
    stages read the stem's map, how their output becomes a map, how the last map becomes the final features, and how the
    weights are initialized. B C H W: batch, channels, height, width.

    References:
        Wightman (2019), PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
    """

    _card_task = "image"
    is_reversible: ClassVar[bool]
    """Whether the network takes a `policy` and therefore has a stored twin."""
    in_channels: int
    """Number of channels of the images."""
    size_multiple: int = 1
    """Number of which the sides of the images must be multiples."""
    num_classes: int
    """Size of the output, or 0 if the head is the identity."""
    num_features: int
    """Number of channels of the final features, the input of the head."""
    feature_info: list[dict[str, Any]]
    """Descriptions of the maps that `forward_intermediates` returns, in order.

    `num_chs` is the number of channels, `reduction` the ratio of the image's side to the map's side, and `module` the
    name of the module whose output the map is.
    """
    stem: PolicySequential
    """At most three modules, whose output is the first feature map, and optional pooling."""
    stages: nn.Sequential | ReversibleSequential
    """Modules that run in order. The output of each one is a feature map."""
    norm: nn.Module
    head: nn.Linear | nn.Identity

    @abc.abstractmethod
    def _enter(self, x: Tensor) -> Any:
        """Return the input of the first stage, given the output of the stem."""

    @abc.abstractmethod
    def _join(self, y: Any) -> Tensor:
        """Return the feature map, given the output of a stage."""

    @abc.abstractmethod
    def _finish(self, x: Tensor) -> Tensor:
        """Return the final features, given the map of the last stage."""

    @abc.abstractmethod
    def _initialize(self, module: nn.Module) -> None:
        """Initialize the weights of the network or of a new head."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the final features before pooling, (B, num_features, H', W')."""
        check_images(x)
        return explain_input_errors(self, self._compute_features, x, self.in_channels)

    def _compute_features(self, x: Tensor) -> Tensor:
        return self._finish(self._join(self.stages(self._enter(self.stem(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool final features and compute the logits.

        Args:
            x: The output of `forward_features`.
            pre_logits: Whether to return the pooled features, (B, num_features), without the linear layer.
        """
        check_images(x)
        check_bool(pre_logits=pre_logits)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"`x` (of shape {tuple(x.shape)}) must be (B, {self.num_features}, H, W), as `forward_features` "
                "returns it."
            )
        pooled = x.mean((-2, -1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits, (B, num_classes), or without a head the pooled features, (B, num_features)."""
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
        """Compute the final features and intermediate feature maps.

        The loss may depend on a map. In a reversible network a map is a new tensor that joins the two streams and lives
        as long as the caller keeps it. The stages continue from the streams and store the same tensors as usual.

        Args:
            x: Images, (B, in_channels, H, W).
            indices: Maps of `feature_info` to return: a number for the last maps, a sequence for chosen maps, where
                negative numbers count from the end, or None for all maps. The order is the order of the network.
            norm: Whether to apply the final norm, and in a convolutional network ReLU, to the map of the last stage.
            stop_early: Whether to skip the stages after the last map that is returned.
            output_fmt: Layout of the maps, "NCHW".
            intermediates_only: Whether to return only the maps.

        Returns:
            The final features and the list of maps. If `stop_early` skipped stages, the last map replaces the final
            features.

        Raises:
            TypeError: `x` is not a floating-point tensor, or a flag is not a bool.
            ValueError: A map or the layout does not exist.
        """
        check_images(x)
        check_bool(norm=norm, stop_early=stop_early, intermediates_only=intermediates_only)
        check_choice("output_fmt", output_fmt, ("NCHW",))
        wanted = _select(indices, len(self.feature_info))
        last = len(self.stages)
        num_stages = max(wanted) if stop_early else last

        def compute(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return self._compute_intermediates(x, wanted, num_stages, norm, intermediates_only)

        features, maps = explain_input_errors(self, compute, x, self.in_channels)
        return maps if intermediates_only else (features, maps)

    def _compute_intermediates(
        self, x: Tensor, wanted: set[int], num_stages: int, norm: bool, intermediates_only: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the features and the maps `wanted`; `forward_intermediates` explains both."""
        last = len(self.stages)
        if 0 in wanted and len(self.stem) > 3:  # The map is inside the stem, so the stem runs in two parts.
            y = self.stem[:3](x)
            maps, y = [y], self.stem[3:](y)
        else:
            y = self.stem(x)
            maps = [y] if 0 in wanted else []
        streams = self._enter(y)
        # Reversible stages between two maps run as one sequence, so that only the maps are stored.
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
        else:
            features = maps[-1]  # the caller does not want them
        return features, maps

    def get_classifier(self) -> nn.Linear | nn.Identity:
        """Return the head, which computes logits from pooled features."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head with a newly initialized one, on the device and with the dtype of the old head.

        Create the optimizer afterwards, because an existing optimizer still holds the old head.

        Args:
            num_classes: Size of the output, or 0 for the identity.

        Raises:
            ValueError: `num_classes` is not a positive integer, or 0.
        """
        check_num_classes(num_classes)
        old = self.head.weight if isinstance(self.head, nn.Linear) else next(self.parameters())
        head = make_head(self.num_features, num_classes)
        self._initialize(head)
        self.head = head.to(old.device, old.dtype).train(self.training)
        self.num_classes = num_classes


def make_head(num_features: int, num_classes: int) -> nn.Linear | nn.Identity:
    """Return the layer after the pooling: linear, or the identity for 0 classes."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def _select(indices: int | Sequence[int] | None, num_maps: int) -> set[int]:
    """Return the set of maps that `indices` selects, counted from 0."""
    if indices is None:
        return set(range(num_maps))
    if is_integer(indices):
        if not 1 <= indices <= num_maps:
            raise ValueError(
                f"`indices` (={describe(indices)}) must be from 1 to {num_maps}, the number of feature maps; for "
                "a single map pass a list."
            )
        return set(range(num_maps - indices, num_maps))
    chosen = list(indices) if isinstance(indices, Sequence) else []
    if not chosen or not all(is_integer(index) and -num_maps <= index < num_maps for index in chosen):
        raise ValueError(
            f"`indices` (={describe(indices)}) must name one or more of the {num_maps} feature maps, from 0 to "
            f"{num_maps - 1}; `feature_info` lists them."
        )
    return {index % num_maps for index in chosen}
