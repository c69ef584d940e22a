"""Reversible vision transformers.

A ViT with two residual streams. The embedded patches of an image enter both. Attention reads the second stream and adds
to the first, and a perceptron reads the first and adds to the second. At the end the streams are concatenated,
normalized, averaged over the patches and classified, so the input of the head is twice as wide as in a ViT. There is no
class token. This follows the published code (PySlowFast with `RESPATH_FUSE: "concat"` and `CLS_EMBED_ON: False` in the
configs of Rev-ViT-S and B, and the authors' minREV), and gives the published sizes.

B C H W: batch, channels, height, width of an image; B H W D: the tokens of its patches, with D features.

References:
    Mangalam et al. (2022), Reversible Vision Transformers, sections 3.2 and 4.
    Dosovitskiy et al. (2021), An Image is Worth 16x16 Words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, MOST_LAYERS, check_count, check_counts, check_share
from revnet.models._checks import check_heads, check_num_classes, check_ratio
from revnet.models._image_classifier import AbstractImageClassifier, make_head
from revnet.models._registry import register_model
from revnet.nn import AbstractPolicy, PolicySequential, Reverse, ReversibleBlock, ReversibleSequential
from revnet.nn.policies._has_policies import as_policy

_EPS = 1e-6
"""Epsilon of the layer norms, as in the published code and most ViTs."""
_DEVIATION = 0.02
"""Standard deviation of the initial weights."""
_MOST_PIXELS = 2**16
"""Largest side of an image."""


class PatchEmbedding(nn.Conv2d):
    """A linear map of each patch: a convolution whose stride equals its kernel size.

    Shape:
        x: (B, in_channels, H, W). Output: (B, dim, H / patch_size, W / patch_size).

    Raises:
        ValueError: A side of the images is not a multiple of `patch_size`.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedded patches."""
        side = self.kernel_size[0]
        height, width = x.shape[-2:]
        if height % side or width % side:
            fitting = "x".join(str(max(1, round(length / side)) * side) for length in (height, width))
            raise ValueError(
                f"images of {height}x{width} cannot be cut into patches of {side}x{side}; resize or pad them, to "
                f"{fitting} for instance, or build the model with another `patch_size`."
            )
        return super().forward(x)


class PositionEmbedding(nn.Module):
    """Learned position embedding, which is interpolated for images of other sizes.

    Shape:
        x: (B, D, H, W), any H and W. Output: the same.
    """

    def __init__(self, dim: int, grid_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, grid_size, grid_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus the embedding."""
        weight: Tensor = self.weight
        if x.shape[-2:] != weight.shape[-2:]:
            weight = F.interpolate(weight, x.shape[-2:], mode="bicubic", antialias=True)
        return x + weight


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the residual of random samples and scales the others to keep the mean.

    References:
        Huang et al. (2016), Deep Networks with Stochastic Depth.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual with random samples set to zero."""
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        """Return the rate for `repr`."""
        return f"rate={self.rate:g}"


class Attention(nn.Module):
    """The residual function f: layer norm and attention of every patch to every patch.

    Shape:
        x: (B, H, W, D). Output: the same.
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual of `x`."""
        B, H, W, D = x.shape
        qkv = self.qkv(self.norm(x)).view(B, H * W, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, num_heads, H * W, D / num_heads)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.project(y.transpose(1, 2).reshape(B, H, W, D))
        return self.drop_path(self.dropout(y))


class Perceptron(nn.Module):
    """The residual function g: layer norm and a perceptron on each patch.

    Shape:
        x: (B, H, W, D). Output: the same.
    """

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.expand = nn.Linear(dim, hidden_dim)
        self.project = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual of `x`."""
        y = self.dropout(F.gelu(self.expand(self.norm(x))))
        return self.drop_path(self.dropout(self.project(y)))


class ReversibleViT(AbstractImageClassifier):
    """A reversible vision transformer.

    Args:
        img_size: Side of the square images for which the position embedding is learned. It is interpolated for images
            of other sizes, which need not be square.
        patch_size: Side of the square patches, each of which becomes a token. `img_size` is a multiple of it.
        dim: Features of a token in each of the two streams, a multiple of `num_heads`.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden width of the perceptrons, as a multiple of `dim`.
        num_classes: Size of the output, or 0 for pooled features instead of logits.
        in_channels: Channels of the input images.
        dropout: Share of features dropped after the position embedding, the attention and each layer of a perceptron.
        drop_path: Share of samples for which a residual of the last block is dropped. The share rises linearly from 0
            in the first block. The two residuals of a block draw independently, as in timm. The published code draws
            once for both.
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`. `Store()` makes the
            stored twin. The patch embedding keeps its own policy, which `model.stem.set_policies(Checkpoint())`
            changes.

    Shape:
        x: (B, in_channels, H, W), where H and W are multiples of `patch_size`. Output: logits, (B, num_classes).

    Numerics:
        Under autocast the streams stay in float32, so that they can be rebuilt, and the residual functions compute in
        low precision.

    Raises:
        TypeError: `policy` is not a policy. In the forward pass: `x` is not a floating-point tensor.
        ValueError: A count is not positive, a share is not from 0 to below 1, `img_size` is not a multiple of
            `patch_size`, `dim` is not a multiple of `num_heads`, or no policy has this name. In the forward pass: the
            sides of the images are not multiples of `patch_size`.

    References:
        Mangalam et al. (2022), Reversible Vision Transformers.
    """

    is_reversible = True

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__()
        check_num_classes(num_classes)
        check_counts(in_channels=in_channels, dim=dim, num_heads=num_heads, most=MOST_CHANNELS)
        check_counts(img_size=img_size, patch_size=patch_size, most=_MOST_PIXELS)
        check_count("depth", depth, most=MOST_LAYERS)
        check_share(dropout=dropout, drop_path=drop_path)
        check_ratio("mlp_ratio", mlp_ratio, dim)
        hidden_dim = int(dim * mlp_ratio)
        if img_size % patch_size:
            raise ValueError(
                f"`img_size` (={img_size}) must be a multiple of `patch_size` (={patch_size}); "
                f"pass {max(1, round(img_size / patch_size)) * patch_size}, or change `patch_size`."
            )
        check_heads(dim, num_heads)
        policy = Reverse() if policy is None else as_policy(policy)
        self.in_channels = in_channels
        self.size_multiple = patch_size
        self.num_classes = num_classes
        self.num_features = 2 * dim
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": "stem"}]
        for index in range(depth):
            self.feature_info.append({"num_chs": 2 * dim, "reduction": patch_size, "module": f"maps.{index}"})

        self.stem = PolicySequential(
            PatchEmbedding(in_channels, dim, patch_size),
            PositionEmbedding(dim, img_size // patch_size),
            nn.Dropout(dropout),
        )
        rates = [drop_path * index / max(1, depth - 1) for index in range(depth)]
        self.stages = ReversibleSequential(
            *[
                ReversibleBlock(
                    Attention(dim, num_heads, dropout=dropout, drop_path=rate),
                    Perceptron(dim, hidden_dim, dropout=dropout, drop_path=rate),
                    split_dim=-1,
                )
                for rate in rates
            ],
            policy=policy,
        )
        self._add_maps()
        self.norm = nn.LayerNorm(2 * dim, eps=_EPS)
        self.head = make_head(2 * dim, num_classes)
        self._initialize(self)

    def _enter(self, x: Tensor) -> Tensor:
        # Concatenated, not a pair, so that the tensor that the blocks store is the one that the norm reads.
        return x.permute(0, 2, 3, 1).repeat(1, 1, 1, 2)  # (B, H, W, 2 * D)

    def _join(self, y: Tensor) -> Tensor:
        return y.permute(0, 3, 1, 2)  # (B, 2 * D, H, W)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def no_weight_decay(self) -> set[str]:
        """Return the name of the position embedding, which weight decay leaves out."""
        return {"stem.1.weight"}

    def _initialize(self, module: nn.Module) -> None:
        """Initialize with a normal of deviation 0.02, truncated at 2 (PyTorch's default), and zero biases."""
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=_DEVIATION)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, PositionEmbedding):
                nn.init.trunc_normal_(layer.weight, std=_DEVIATION)


@register_model(image_size=32)
def revvit_cifar(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    img_size: int = 32,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleViT:
    """Return a reversible ViT for CIFAR with 4x4 patches: 2,699,530 parameters for 10 classes. Not in the paper."""
    return ReversibleViT(
        img_size=img_size,
        patch_size=4,
        dim=192,
        depth=9,
        num_heads=6,
        mlp_ratio=2,
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=dropout,
        drop_path=drop_path,
        policy=policy,
    )


@register_model(image_size=224)
def revvit_small(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    img_size: int = 224,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleViT:
    """Return Rev-ViT-S for ImageNet: 22,434,664 parameters for 1000 classes. The paper uses `drop_path=0.1`."""
    return ReversibleViT(
        img_size=img_size,
        dim=384,
        depth=12,
        num_heads=6,
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=dropout,
        drop_path=drop_path,
        policy=policy,
    )


@register_model(image_size=224)
def revvit_base(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    img_size: int = 224,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleViT:
    """Return Rev-ViT-B for ImageNet: 87,335,656 parameters for 1000 classes. The paper uses `drop_path=0.2`."""
    return ReversibleViT(
        img_size=img_size,
        dim=768,
        depth=12,
        num_heads=12,
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=dropout,
        drop_path=drop_path,
        policy=policy,
    )
