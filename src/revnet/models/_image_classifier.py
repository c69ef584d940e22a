"""The interface of image classifiers: a backbone, pooling and a head, with timm's names."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import check_bool, check_choice, check_share
from revnet.models._backbone import AbstractBackbone, select_maps
from revnet.models._checks import check_images, check_num_classes
from revnet.models.pretrained.mixin import HubMixin

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((-2, -1)),
    "max": lambda x: x.amax((-2, -1)),
    "": lambda x: x,
}
"""Poolings by timm's names. The empty name means no pooling, for a network without a head."""


class AbstractImageClassifier(AbstractBackbone, HubMixin):
    """A network from images to logits: stem, stages, final norm, pooling and head.

    The methods have the names and meanings of timm's methods. A subclass sets the fields below and the fields of
    `AbstractBackbone`. It defines how the stages read the stem's map, how their output becomes a map, how the last map
    becomes the final features, and how the weights are initialized. B C H W: batch, channels, height, width.

    References:
        Wightman (2019), PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
    """

    _card_task = "image"
    is_reversible: ClassVar[bool]
    """Whether the network takes a `policy` and therefore has a stored twin."""
    num_classes: int
    """Size of the output, or 0 if the head is the identity."""
    num_features: int
    """Number of channels of the final features, the input of the head."""
    head: nn.Linear | nn.Identity
    global_pool: str = "avg"
    """Pooling before the head: "avg", "max", or "" for none."""
    drop_rate: float = 0.0
    """Share of pooled features that are dropped in training, before the head."""

    _is_pruned: bool = False
    """Whether `prune_intermediate_layers` has removed stages or the norm."""

    def _changes(self) -> dict[str, Any]:
        if self._is_pruned:
            raise ValueError(
                f"this {type(self).__name__} has lost stages by `prune_intermediate_layers`, which a file cannot "
                "describe; save the state dict, or the whole network before it is pruned."
            )
        usual = {"global_pool": "avg", "drop_rate": 0.0}
        return {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}

    def _apply_changes(self, config: Mapping[str, Any]) -> None:
        global_pool, drop_rate = (config.get(name, getattr(self, name)) for name in ("global_pool", "drop_rate"))
        check_global_pool(global_pool, self.num_classes)
        check_share(drop_rate=drop_rate)
        self.global_pool, self.drop_rate = global_pool, float(drop_rate)

    @property
    def in_chans(self) -> int:
        """Number of channels of the images, under timm's name."""
        return self.in_channels

    @property
    def head_hidden_size(self) -> int:
        """Number of features that the head reads."""
        return self.num_features

    @abc.abstractmethod
    def _initialize(self, module: nn.Module) -> None:
        """Initialize the weights of the network or of a new head."""

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
        pooled = POOLS[self.global_pool](x)
        if self.drop_rate:
            pooled = F.dropout(pooled, self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits, (B, num_classes), or without a head the pooled features, (B, num_features)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self, name_only: bool = False) -> nn.Linear | nn.Identity | str:
        """Return the head, which computes logits from pooled features.

        Args:
            name_only: Whether to return its name instead.
        """
        check_bool(name_only=name_only)
        return "head" if name_only else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a newly initialized one, on the device and with the dtype of the old head.

        Create the optimizer afterwards, because an existing optimizer still holds the old head.

        Args:
            num_classes: Size of the output, or 0 for the identity.
            global_pool: Pooling from now on: "avg", "max", or "" for none, which needs `num_classes=0`. None keeps the
                pooling.

        Raises:
            ValueError: `num_classes` is not a positive integer, or 0, or no such pooling exists.
        """
        check_num_classes(num_classes)
        global_pool = self.global_pool if global_pool is None else global_pool
        check_global_pool(global_pool, num_classes)
        head = make_head(self.num_features, num_classes)
        if isinstance(head, nn.Linear):
            old = self.head.weight if isinstance(self.head, nn.Linear) else next(self.parameters())
            self._initialize(head)
            head.to(old.device, old.dtype)
        self.head = head.train(self.training)
        self.num_classes = num_classes
        self.global_pool = global_pool

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last map that is wanted, so that they take neither time nor memory.

        Args:
            indices: Maps of `feature_info` that are wanted, as in `forward_intermediates`.
            prune_norm: Whether to remove the final norm, too. It goes in any case if stages go.
            prune_head: Whether to remove the head and the pooling, too. They go in any case if stages go.

        Returns:
            The maps that are wanted, counted from 0.

        Raises:
            TypeError: A flag is not a bool.
            ValueError: A map does not exist.
        """
        check_bool(prune_norm=prune_norm, prune_head=prune_head)
        wanted = select_maps(indices, len(self.feature_info))
        num_removed = self._keep_stages(max(wanted))
        if num_removed or prune_norm:
            self.norm = nn.Identity()
            self._is_pruned = True
        if num_removed or prune_head:
            self.reset_classifier(0, "")
        if num_removed:
            self.num_features = self.feature_info[-1]["num_chs"] if len(self.stages) else self._num_entering()
        return sorted(wanted)

    def _num_entering(self) -> int:
        """Return the number of channels of all streams before the first stage."""
        x = torch.empty(1, self.feature_info[0]["num_chs"], 1, 1, device="meta")
        return self._join(self._enter(x)).shape[1]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions that group parameters by depth, for timm's layer decay.

        Args:
            coarse: Whether a group is a stage instead of a block.
        """
        check_bool(coarse=coarse)
        return {"stem": r"^stem\.", "blocks": [*(() if coarse else _BLOCKS), *_STAGES, (r"^norm\.", _AS_BEFORE)]}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay leaves out, in addition to biases and norms."""
        return set()


_AS_BEFORE = (99999,)
"""What timm appends to the key of a group to merge the group into the one before it."""
_BLOCKS = (
    (r"^stages\.(\d+)\.downsample\.", (-1,)),  # before block 0 of the stage
    (r"^stages\.(\d+)\.\w+\.blocks\.(\d+)\.", None),
    (r"^stages\.(\d+)\.(\d+)\.", None),
)
"""Patterns of blocks in stages, with the suffix of their key."""
_STAGES = ((r"^stages\.blocks\.(\d+)\.", None), (r"^stages\.(\d+)\.", None))


def make_head(num_features: int, num_classes: int) -> nn.Linear | nn.Identity:
    """Return the layer after the pooling: linear, or the identity for 0 classes."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def check_global_pool(global_pool: str, num_classes: int) -> None:
    """Raise unless `global_pool` is the name of a pooling that fits a head with `num_classes`."""
    check_choice("global_pool", global_pool, tuple(POOLS))
    if not global_pool and num_classes:
        raise ValueError(
            f"`global_pool` (='') needs `num_classes=0` (not {num_classes}), since the head reads pooled features; "
            "pass 'avg'."
        )
