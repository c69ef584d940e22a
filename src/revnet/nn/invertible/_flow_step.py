"""A step of Glow as a reversible block, so that any number of steps keeps only the last activation."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_bool, check_count, describe, is_integer
from revnet._types import TensorPair
from revnet.coupling import AbstractCoupling, Affine
from revnet.engine import HalfBlock
from revnet.engine._split import split
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock, check_coupling, check_functions, reads
from revnet.nn.invertible._abstract_invertible import without_autocast
from revnet.nn.invertible._act_norm import normalizing_values
from revnet.nn.invertible._channel_couplings import ChannelMatrix, ChannelScale, check_stream, mix_channels
from revnet.nn.invertible._permutation import check_channels

_AFFINE = Affine()
_MOST_CHANNELS = 2**15
"""A decomposition of a larger matrix would take hours."""


class _NormParameters(nn.Module):
    """The function of a half-block that normalizes a stream: it returns scale and bias, (2, C)."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((self.log_scale, self.bias))


class _LowerUpper(nn.Module):
    """The function of a half-block that mixes the channels of a stream: it returns L and U in one matrix, (C, C)."""

    # Without buffers, such as the signs of the diagonal: a run keeps copies of the buffers of every function.
    def __init__(self, matrix: Tensor):
        super().__init__()
        diagonal = matrix.diagonal()
        self.log_scale = nn.Parameter(diagonal.log())
        self.triangles = nn.Parameter(matrix - diagonal.diag())

    def forward(self, x: Tensor) -> Tensor:
        off_diagonal = self.triangles - self.triangles.diagonal().diag()
        return off_diagonal + self.log_scale.exp().diag()


class _ChannelMix(nn.Module):
    """The function of an additive half-block: a matrix times the channels of the other stream."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.weight = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        check_stream(x, self.weight.shape[1], "a `FlowStep`")
        with without_autocast(x):
            return mix_channels(self.weight.to(x.dtype), x)


class FlowStep(AbstractReversibleBlock):
    """A step of Glow: normalize the channels, mix them by a learned matrix, and couple the halves.

    It computes what `ActNorm`, a 1x1 convolution and a `CouplingLayer` compute one after the other. As those layers are
    parts of the block here, the backward pass rebuilds their inputs, too, and a sequence of any number of steps keeps
    only its last activation. Without `mixes`, it is a coupling layer of RealNVP with `ActNorm` instead of batch norm.

    The matrix starts as a random rotation, and is stored in blocks: `x1 <- A x1`, `x1 <- x1 + B x2`, `x2 <- S x2`,
    `x2 <- x2 + E x1`, where A and S are products of a lower and an upper triangular matrix, as in `InvertibleConv1x1`.
    Before training, call `initialize_act_norms`.

    Args:
        f: The residual function of the coupling. It is called with the stream that stays and the additional arguments.
            For `Affine()` it returns a tensor with twice the channels of its stream.
        num_channels: Channels of the input; even.
        updates: The stream that the coupling updates: 0 for the first, 1 for the second.
        mixes: Whether the channels are mixed.
        coupling: How the residual is combined with the stream: `Affine()` or `Additive()`.

    Shape:
        x: (B, num_channels, ...), or a pair of tensors with half the channels. Output: the same.

    Raises:
        TypeError: `f` is not a module, `coupling` is not a coupling, or `mixes` is not a bool.
        ValueError: `num_channels` is not even, `updates` is neither 0 nor 1, or `coupling` is exact.

    References:
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, section 3 and table 1.
        Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.nn import FlowStep, InvertibleSequential
        >>> steps = [FlowStep(nn.Conv2d(2, 4, 1), num_channels=4) for _ in range(8)]
        >>> flow, x = InvertibleSequential(*steps), torch.rand(2, 4, 6, 6)
        >>> y, log_det = flow.forward_with_log_det(x)
        >>> torch.allclose(flow.inverse(y), x, atol=1e-4), log_det.shape
        (True, torch.Size([2]))
    """

    is_initialized: Tensor

    def __init__(
        self,
        f: nn.Module,
        *,
        num_channels: int,
        updates: Literal[0, 1] = 0,
        mixes: bool = True,
        coupling: AbstractCoupling = _AFFINE,
    ):
        super().__init__()
        check_functions(f=f)
        check_coupling(coupling)
        check_bool(mixes=mixes)
        check_count("num_channels", num_channels, least=2, most=_MOST_CHANNELS if mixes else MOST_CHANNELS)
        if num_channels % 2:
            raise ValueError(
                f"`num_channels` (={num_channels}) must be even, since the step couples two halves; put a "
                "`SpaceToDepth` before it, which makes four channels of one."
            )
        if not is_integer(updates) or updates not in (0, 1):
            raise ValueError(f"`updates` (={describe(updates)}) must be 0 for the first stream, or 1 for the second.")
        if coupling.is_exact:
            raise ValueError(
                f"`coupling` (={coupling}) is exact only on the points of a grid, which the normalization leaves; pass "
                "`Affine()` or `Additive()`, or build the network from `CouplingLayer`."
            )
        half = num_channels // 2
        self.norm1, self.norm2 = _NormParameters(half), _NormParameters(half)
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.mix1: nn.Module | None = None
        if mixes:
            self.mix1, self.add2, self.mix2, self.add1 = _rotation(half)
        self.f = f
        self.split_dim = 1
        self.num_channels = num_channels
        self.updates = updates
        self.coupling = coupling

    @reads("coupling", "updates", children=("norm1", "norm2", "mix1", "add2", "mix2", "add1", "f"))
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the half-blocks in order. `prefix`, such as "blocks.3.", names the step in errors."""

        def own(name: str, target: int, coupling: AbstractCoupling | None = None) -> HalfBlock:
            options: dict[str, Any] = {} if coupling is None else {"coupling": coupling}
            return HalfBlock(
                self._modules[name],  # type: ignore[arg-type]
                target,
                1 - target,
                prefix + name,
                role=name,
                takes_arguments=False,
                **options,
            )

        half_blocks = [own("norm1", 0, ChannelScale()), own("norm2", 1, ChannelScale())]
        if self.mix1 is not None:
            half_blocks += [own("mix1", 0, ChannelMatrix()), own("add2", 0)]
            half_blocks += [own("mix2", 1, ChannelMatrix()), own("add1", 1)]
        return [*half_blocks, HalfBlock(self.f, self.updates, 1 - self.updates, prefix + "f", self.coupling)]

    @torch.no_grad()
    def initialize(self, x: Tensor | TensorPair) -> None:
        """Set the normalization from the input of the step, a tensor or its streams, unless it is already set.

        `initialize_act_norms` does so for a whole model.

        Raises:
            TypeError: The input is not floating-point.
            ValueError: The input has another number of channels than the step.
        """
        if self.is_initialized:
            return
        streams = split(x, self.split_dim)
        for index, stream in enumerate(streams):
            check_channels(stream, self.num_channels // 2, f"x{index + 1}")
        for norm, stream in zip((self.norm1, self.norm2), streams, strict=True):
            log_scale, bias = normalizing_values(stream)
            norm.log_scale.copy_(log_scale)
            norm.bias.copy_(bias)
        self.is_initialized.fill_(True)

    def extra_repr(self) -> str:
        """Return the channels and the options that differ from the default, for `repr`."""
        options = [f"num_channels={self.num_channels}", f"updates={self.updates}"]
        options += [f"coupling={self.coupling}"] if self.coupling != _AFFINE else []
        return ", ".join(options)


def _rotation(half: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Return the functions A, B, S, E that mix `2 * half` channels by a random rotation, [[A, B], [E A, E B + S]]."""
    # In float64, and on the CPU: the meta device cannot decompose a matrix.
    rotation, _ = torch.linalg.qr(torch.randn(2 * half, 2 * half, dtype=torch.float64, device="cpu"))
    # The rows in the order of the pivots, still a rotation, so that no block is nearly singular.
    _, lower, upper = torch.linalg.lu(rotation)
    # Some rows change their sign, so that the diagonal of U is positive.
    signs = upper.diagonal().sign()
    lower, upper = signs[:, None] * lower * signs, signs[:, None] * upper
    like = torch.empty(())  # of the default type and device
    # Contiguous, because factors come in columns, and FSDP shards by rows.
    first = lower[:half, :half].tril(-1) + upper[:half, :half]
    second = lower[half:, half:].tril(-1) + upper[half:, half:]
    from_second = lower[:half, :half] @ upper[:half, half:]
    from_first = torch.linalg.solve_triangular(
        lower[:half, :half], lower[half:, :half], upper=False, left=False, unitriangular=True
    )
    return (
        _LowerUpper(first.to(like).contiguous()),
        _ChannelMix(from_second.to(like).contiguous()),
        _LowerUpper(second.to(like).contiguous()),
        _ChannelMix(from_first.to(like).contiguous()),
    )
