"""NICE: a density model of images, built from reversible blocks.

The odd components of an image form one stream, and the even components the other. Additive coupling layers, each a
perceptron, update the streams alternately, and a diagonal scaling comes last. The map is a bijection whose
log-determinant is the sum of the log-scales, so the density of an image follows exactly from the density of its code
under the prior. Two coupling layers form one reversible block, so the backward pass computes their activations again.

B C H W: batch, channels, height, width; D = C H W: the number of components of an image and of its code.

References:
    Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation, sections 3 and 5.
"""

import torch
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, MOST_LAYERS, check_count, check_counts
from revnet.models._density import AbstractImageDensity
from revnet.models._prior import PriorName
from revnet.nn import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential
from revnet.nn.policies._has_policies import as_policy


class CouplingFunction(nn.Sequential):
    """The function m of a coupling layer: a perceptron with ReLU units. Its last layer is initialized to zero.

    Shape:
        x: (B, in_features). Output: (B, out_features).
    """

    def __init__(self, in_features: int, out_features: int, *, hidden_dim: int, num_hidden: int):
        layers: list[nn.Module] = []
        for index in range(num_hidden):
            layers += [nn.Linear(in_features if index == 0 else hidden_dim, hidden_dim), nn.ReLU()]
        last = nn.Linear(hidden_dim, out_features)
        # Each coupling starts as the identity, which stabilizes the training of deep flows (Kingma and Dhariwal, 2018).
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)


class NICE(AbstractImageDensity):
    """A density of images that can also be sampled.

    The defaults, except for `image_shape`, are the paper's network for MNIST: 4 coupling layers with 5 hidden layers of
    1000 units each. For CIFAR-10 the paper uses 4 hidden layers of 2000 units.

    Args:
        image_shape: Shape of the images, (C, H, W).
        num_couplings: Number of coupling layers. It is even, because a reversible block consists of two.
        hidden_dim: Units of each hidden layer.
        num_hidden: Number of hidden layers in each coupling layer.
        prior: Distribution of the components of a code: "logistic", which the paper uses for most data sets, or
            "gaussian".
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`. `Store()` makes the
            stored twin.

    Shape:
        x: (B, C, H, W) in [0, 1], *dequantized* by adding uniform noise that is as wide as one gray level.
        z: (B, D).

    Raises:
        TypeError: `policy` is not a policy. In the passes: the input is not a floating-point tensor.
        ValueError: A count is not positive, `num_couplings` is odd, `image_shape` has fewer than two components, or no
            prior or policy has this name. In the passes: the input has another shape.

    Numerics:
        `inverse` restores images up to the rounding of the scaling and of one addition and subtraction per coupling.
        In float32 the error is about 1e-6 if the functions return values that are not larger than the images.

    References:
        Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_couplings: int = 4,
        hidden_dim: int = 1000,
        num_hidden: int = 5,
        prior: PriorName = "logistic",
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__(image_shape, prior)
        check_counts(num_couplings=num_couplings, num_hidden=num_hidden, most=MOST_LAYERS)
        check_count("hidden_dim", hidden_dim, most=MOST_CHANNELS)
        if num_couplings % 2:
            raise ValueError(
                f"`num_couplings` (={num_couplings}) must be even, since a reversible block consists of two; use "
                f"{num_couplings + 1}."
            )
        odd, even = self.num_components - self.num_components // 2, self.num_components // 2
        sizes = {"hidden_dim": hidden_dim, "num_hidden": num_hidden}
        self.couplings = ReversibleSequential(
            *[
                ReversibleBlock(CouplingFunction(even, odd, **sizes), CouplingFunction(odd, even, **sizes))
                for _ in range(num_couplings // 2)
            ],
            policy=Reverse() if policy is None else as_policy(policy),
        )
        self.log_scale = nn.Parameter(torch.zeros(self.num_components))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        components = x.flatten(1)
        y1, y2 = self.couplings((components[:, 0::2], components[:, 1::2]))
        return torch.cat((y1, y2), 1) * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[0])

    def _decode(self, z: Tensor) -> Tensor:
        y = z * (-self.log_scale).exp()
        x1, x2 = self.couplings.inverse((y[:, : (z.shape[1] + 1) // 2], y[:, (z.shape[1] + 1) // 2 :]))
        if x1.shape != x2.shape:  # With an odd number of components the first stream has one more.
            return torch.cat((torch.stack((x1[:, :-1], x2), 2).flatten(1), x1[:, -1:]), 1).view(-1, *self.image_shape)
        return torch.stack((x1, x2), 2).view(-1, *self.image_shape)
