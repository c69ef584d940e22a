"""Highway networks, and plain and residual networks of the same width to compare with.

A highway layer mixes its input with a transform of it, by a gate that it computes from the input: y = T H + (1 - T) x.
With gates that are nearly closed at first, a hundred layers train where plain layers, y = H, stall. A residual layer,
y = x + H, has no gates. All layers of a network have the same width. B C H W: batch, channels, height, width.

References:
    Srivastava, Greff, Schmidhuber (2015), Training Very Deep Networks.
    He et al. (2016), Deep Residual Learning for Image Recognition.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, MOST_LAYERS, check_bool, check_choice, check_count, describe, is_number
from revnet.models._checks import check_counts_of, check_num_classes
from revnet.models._image_classifier import AbstractImageClassifier, make_head
from revnet.models._initialize import initialize
from revnet.models._registry import register_model
from revnet.models.resnet import MaxPool2dSame, batch_norm
from revnet.nn import PolicySequential

LayerName = Literal["highway", "plain", "residual"]

_GATE_BIAS = -2.0
"""Initial bias of the gates by default: sigmoid(-2) = 0.12."""


def make_transform(in_channels: int, width: int, stride: int = 1, *, norm: bool) -> list[nn.Module]:
    """Return the transform H: a 3x3 convolution, BN if `norm`, and ReLU."""
    convolution = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=not norm)
    return [convolution, *([batch_norm(width)] if norm else []), nn.ReLU()]


class PlainLayer(nn.Module):
    """`y = H(x)`.

    Shape:
        x: (B, width, H, W). Output: the same.
    """

    def __init__(self, width: int, *, norm: bool):
        super().__init__()
        self.transform = nn.Sequential(*make_transform(width, width, norm=norm))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        return self.transform(x)


class ResidualLayer(nn.Module):
    """`y = x + H(x)`.

    Shape:
        x: (B, width, H, W). Output: the same.
    """

    def __init__(self, width: int, *, norm: bool):
        super().__init__()
        self.transform = nn.Sequential(*make_transform(width, width, norm=norm))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        return x + self.transform(x)


class HighwayLayer(nn.Module):
    """`y = T(x) H(x) + (1 - T(x)) x`, where the gate T is the sigmoid of a 3x3 convolution.

    Shape:
        x: (B, width, H, W). Output: the same.
    """

    def __init__(self, width: int, *, norm: bool, gate_bias: float):
        super().__init__()
        self.transform = nn.Sequential(*make_transform(width, width, norm=norm))
        self.gate = nn.Conv2d(width, width, 3, padding=1)
        self.gate_bias = gate_bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        # `lerp` stores nothing that the convolutions and activations do not store: x, H and T.
        return torch.lerp(x, self.transform(x), self.gate(x).sigmoid())

    def extra_repr(self) -> str:
        """Return the initial bias of the gate, for `repr`."""
        return f"gate_bias={self.gate_bias}"


class Highway(AbstractImageClassifier):
    """A network of highway layers for images, or of plain or residual layers of the same width.

    Each layer is a unit with its own policy: `set_policy(model, Checkpoint())` keeps only the input of each layer. The
    layers cannot be reversed, because the gate that mixed the input away depends on it.

    Args:
        num_layers: Number of layers in each stage. Max-pooling halves the image between stages.
        width: Number of channels of all layers.
        layer: "highway", "plain" or "residual".
        gate_bias: Initial bias of the gates. The more negative, the more of its input a layer passes on at first.
            The default is -2. Only highway layers have gates.
        norm: Whether to normalize the output of each convolution, except in the gates, and the final features with
            BN. The published highway networks do without.
        stem_stride: Stride of the stem, a 3x3 convolution and ReLU.
        num_classes: Size of the output, or 0 for pooled features instead of logits.
        in_channels: Channels of the input images.

    Shape:
        x: (B, in_channels, H, W) with any H and W. Output: logits, (B, num_classes).

    Raises:
        TypeError: `num_layers` is not a sequence, or `norm` is not a bool. In the forward pass: `x` is not a
            floating-point tensor.
        ValueError: A count is not positive, no layer has this name, or `gate_bias` is not a number or given for layers
            without gates.

    References:
        Srivastava, Greff, Schmidhuber (2015), Training Very Deep Networks.
    """

    is_reversible = False

    def __init__(
        self,
        *,
        num_layers: Sequence[int],
        width: int,
        layer: LayerName = "highway",
        gate_bias: float | None = None,
        norm: bool = False,
        stem_stride: int = 1,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        check_counts_of("num_layers", num_layers, most=MOST_LAYERS, example="(6, 6, 6)")
        if not num_layers:
            raise ValueError(f"`num_layers` (={describe(num_layers)}) must have at least one stage, such as (6, 6, 6).")
        check_count("width", width, most=MOST_CHANNELS)
        check_choice("layer", layer, ("highway", "plain", "residual"))
        _check_gate_bias(gate_bias, layer)
        check_bool(norm=norm)
        check_count("stem_stride", stem_stride, most=MOST_CHANNELS)
        check_num_classes(num_classes)
        check_count("in_channels", in_channels, most=MOST_CHANNELS)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = width
        self.feature_info = [{"num_chs": width, "reduction": stem_stride, "module": "stem"}] + [
            {"num_chs": width, "reduction": stem_stride * 2**stage, "module": f"stages.{stage}"}
            for stage in range(len(num_layers))
        ]
        self.stem = PolicySequential(*make_transform(in_channels, width, stem_stride, norm=norm))

        def make_layer() -> nn.Module:
            if layer == "highway":
                return HighwayLayer(width, norm=norm, gate_bias=_GATE_BIAS if gate_bias is None else float(gate_bias))
            return PlainLayer(width, norm=norm) if layer == "plain" else ResidualLayer(width, norm=norm)

        self.stages = nn.Sequential(
            *[
                nn.Sequential(
                    *([MaxPool2dSame()] if stage else []), *[PolicySequential(make_layer()) for _ in range(count)]
                )
                for stage, count in enumerate(num_layers)
            ]
        )
        self.norm = batch_norm(width) if norm else nn.Identity()
        self.head = make_head(width, num_classes)
        self._initialize(self)

    def _enter(self, x: Tensor) -> Tensor:
        return x

    def _join(self, y: Tensor) -> Tensor:
        return y

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _initialize(self, module: nn.Module) -> None:
        initialize(module)
        for part in module.modules():
            if isinstance(part, nn.Conv2d):  # `initialize` is for convolutions without bias
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for part in module.modules():
            if isinstance(part, HighwayLayer):
                assert part.gate.bias is not None
                nn.init.constant_(part.gate.bias, part.gate_bias)


def _check_gate_bias(gate_bias: float | None, layer: str) -> None:
    """Raise an error unless `gate_bias` is None, or a number for a layer with gates."""
    if gate_bias is None:
        return
    if not is_number(gate_bias):
        raise ValueError(f"`gate_bias` (={describe(gate_bias)}) must be a number; -2 is usual.")
    if layer != "highway":
        raise ValueError(
            f"`gate_bias` (={describe(gate_bias)}) is for highway layers, and {layer} layers have no gates; leave it "
            "out, or pass layer='highway'."
        )


@register_model(image_size=32)
def highway20(*, num_classes: int = 10, in_channels: int = 3, gate_bias: float | None = None) -> Highway:
    """Return a highway network of 20 layers and width 16 for CIFAR: 84,138 parameters for 10 classes.

    `gate_bias` is the initial bias of the gates, by default -2. Depth and width are not published ones.
    """
    return _for_cifar("highway", 6, num_classes, in_channels, gate_bias)


@register_model(image_size=32)
def highway110(*, num_classes: int = 10, in_channels: int = 3, gate_bias: float | None = None) -> Highway:
    """Return a highway network of 110 layers and width 16 for CIFAR: 501,738 parameters for 10 classes.

    `gate_bias` is the initial bias of the gates, by default -2. Depth and width are not published ones.
    """
    return _for_cifar("highway", 36, num_classes, in_channels, gate_bias)


@register_model(image_size=32)
def plain20(*, num_classes: int = 10, in_channels: int = 3) -> Highway:
    """Return a plain network of 20 layers and width 16 for CIFAR, without shortcuts: 42,378 parameters."""
    return _for_cifar("plain", 6, num_classes, in_channels)


@register_model(image_size=32)
def plain110(*, num_classes: int = 10, in_channels: int = 3) -> Highway:
    """Return a plain network of 110 layers and width 16 for CIFAR, without shortcuts: 251,178 parameters.

    It does not train: docs/models.md shows where it stalls.
    """
    return _for_cifar("plain", 36, num_classes, in_channels)


def _for_cifar(
    layer: LayerName, per_stage: int, num_classes: int, in_channels: int, gate_bias: float | None = None
) -> Highway:
    """Return a network of three stages, as deep as the stem, the layers and the head together."""
    return Highway(
        num_layers=(per_stage,) * 3,
        width=16,
        layer=layer,
        gate_bias=gate_bias,
        num_classes=num_classes,
        in_channels=in_channels,
    )
