"""The interface of backbones: stem, stages and the feature maps after them, with timm's names."""

import abc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from revnet._checks import check_bool, check_choice, describe, is_integer
from revnet.models._checks import check_images, explain_input_errors
from revnet.nn import HasGradientCheckpointing, PolicySequential, ReversibleSequential


class FeatureMap(nn.Identity):
    """The feature map after a stage whose output is a pair of streams, as a module for hooks.

    The network calls it only if it has hooks, since joining the streams takes memory.
    """

    runs_only_with_hooks: ClassVar[bool] = True
    """Whether a hook changes what the network computes. Memory tools set no hooks on such a module."""

    @property
    def is_hooked(self) -> bool:
        """Whether the module has hooks."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)

    def shown(self, x: Tensor, is_wanted: bool) -> list[Tensor]:
        """Call the hooks with the map, and return the map if it is wanted.

        Raises:
            RuntimeError: A hook has replaced the map. The next stage reads the streams and would ignore it.
        """
        y = self(x)
        if y is not x and not self._backward_hooks and not self._backward_pre_hooks:  # those return a view
            raise RuntimeError(
                "a hook of a `FeatureMap` replaced the map, which the stages after it would not see; return None from "
                "the hook, and read the map only."
            )
        return [y] if is_wanted else []


class AbstractBackbone(HasGradientCheckpointing, abc.ABC):
    """A network from images to features: stem, stages and final norm.

    A subclass sets the fields below. It defines how the stages read the stem's map, how their output becomes a map, and
    how the last map becomes the final features. B C H W: batch, channels, height, width.
    """

    in_channels: int
    """Number of channels of the images."""
    size_multiple: int = 1
    """Number of which the sides of the images must be multiples."""
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

    @abc.abstractmethod
    def _enter(self, x: Tensor) -> Any:
        """Return the input of the first stage, given the output of the stem."""

    @abc.abstractmethod
    def _join(self, y: Any) -> Tensor:
        """Return the feature map, given the output of a stage."""

    @abc.abstractmethod
    def _finish(self, x: Tensor) -> Tensor:
        """Return the final features, given the map of the last stage."""

    def _add_maps(self) -> None:
        """Add a `FeatureMap` after each stage, as `maps`, and name them in `feature_info`."""
        self.maps = nn.ModuleList([FeatureMap() for _ in self.stages])
        for index, info in enumerate(self.feature_info[1:]):
            info["module"] = f"maps.{index}"

    def _hooked_maps(self) -> dict[int, FeatureMap]:
        """Return the maps that have hooks, by their index in `feature_info`."""
        maps = self._modules.get("maps")
        if maps is None:
            return {}
        return {
            index: map_
            for index, map_ in enumerate(maps._modules.values(), 1)
            if isinstance(map_, FeatureMap) and map_.is_hooked
        }

    def _keep_stages(self, num_stages: int) -> int:
        """Remove the stages after the first `num_stages`, and return how many were removed."""
        num_removed = len(self.stages) - num_stages
        if num_removed:
            stages = self.stages[:num_stages]
            assert isinstance(stages, nn.Sequential | ReversibleSequential)
            self.stages = stages
            self.feature_info = self.feature_info[: num_stages + 1]
            if "maps" in self._modules:
                self.maps = self.maps[:num_stages]
        return num_removed

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the final features before pooling, (B, num_features, H', W')."""
        check_images(x)
        return explain_input_errors(self, self._compute_features, x, self.in_channels)

    def _compute_features(self, x: Tensor) -> Tensor:
        if self._hooked_maps():
            return self._compute_intermediates(x, set(), len(self.stages), False, False)[0]
        return self._finish(self._join(self.stages(self._enter(self.stem(x)))))

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
        wanted = select_maps(indices, len(self.feature_info))
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
        hooked = {index: map_ for index, map_ in self._hooked_maps().items() if index <= num_stages}
        if 0 in wanted and len(self.stem) > 3:  # The map is inside the stem, so the stem runs in two parts.
            y = self.stem[:3](x)
            maps, y = [y], self.stem[3:](y)
        else:
            y = self.stem(x)
            maps = [y] if 0 in wanted else []
        streams = self._enter(y)
        # Reversible stages between two maps run as one sequence, so that only the maps are stored.
        for start, stop in pairwise(sorted({0, *wanted, *hooked, num_stages})):
            streams = self.stages[start:stop](streams)
            if stop in hooked:
                maps += hooked[stop].shown(self._join(streams), stop in wanted)
            elif stop in wanted:
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


def select_maps(indices: int | Sequence[int] | None, num_maps: int) -> set[int]:
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
