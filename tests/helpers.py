"""Lists of all kinds of blocks, policies and models. The contracts run over these lists, so new entries are tested."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revnet import (
    AbstractPolicy,
    Checkpoint,
    FixedPoint,
    Offload,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    create_model,
)
from revnet.coupling import Affine, ExactScaled, Scaled
from revnet.errors import ReconstructionError
from revnet.models import IRevNet, ReversibleTransformer, ReversibleViT, RevNet
from revnet.nn import (
    AbstractReversibleBlock,
    BatchNorm2dBiased,
    CouplingLayer,
    FlowStep,
    GroupedBlock,
    LeapfrogBlock,
    MomentumBlock,
    MultiStreamBlock,
)


class ConvResidual(nn.Module):
    """BN, ReLU and 3x3 convolution, twice: the paper's F and G."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_channels)
        self.conv1 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_channels)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class Attention(nn.Module):
    """Layer norm and self-attention, with an optional mask and a context that is added to the keys."""

    def __init__(self, num_features: int, num_heads: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.qkv = nn.Linear(num_features, 3 * num_features)
        self.project = nn.Linear(num_features, num_features)
        self.num_heads = num_heads

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        if context is not None:
            k = k + context
        q, k, v = (t.view(B, T, self.num_heads, D // self.num_heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.project(y.transpose(1, 2).reshape(B, T, D))


class BiasedNormResidual(nn.Sequential):
    """Two convolutions with TensorFlow's batch norm, as in the models."""

    def __init__(self, num_channels: int):
        layers: list[nn.Module] = []
        for _ in range(2):
            convolution = nn.Conv2d(
                num_channels, num_channels, 3, padding=1, bias=False
            )  # without bias, which would be noise before a norm
            layers += [BatchNorm2dBiased(num_channels), nn.ReLU(), convolution]
        super().__init__(*layers)


class FeedForward(nn.Module):
    """Layer norm and a two-layer perceptron, which ignores the attention's arguments."""

    def __init__(self, num_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.layers = nn.Sequential(
            nn.Linear(num_features, 2 * num_features), nn.GELU(), nn.Linear(2 * num_features, num_features)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layers(self.norm(x))


class Averaging(nn.Module):
    """Centers its input with moving averages: one rebinds its buffer, one writes to it, one counts."""

    def __init__(self, num_features: int):
        super().__init__()
        self.linear = nn.Linear(num_features, num_features)
        self.register_buffer("rebound", torch.zeros(num_features))
        self.register_buffer("written", torch.zeros(1, num_features))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.detach().mean(0)
            self.rebound = 0.9 * self.rebound + 0.1 * mean
            self.written.lerp_(mean, 0.2)
            self.count += 1
        return self.linear(torch.tanh(x - self.rebound) * (2 - self.written)) / (1 + self.count)


class Conditioned(nn.Module):
    """Takes its arguments from a nested structure, parts of which need gradients."""

    def __init__(self, num_features: int):
        super().__init__()
        self.linear = nn.Linear(num_features, num_features)

    def forward(self, x: Tensor, context: dict[str, Any], *, scales: tuple[Tensor, float]) -> Tensor:
        first, second = context["shifts"]
        return self.linear(torch.tanh(x + first) * second["shift"]) * scales[0] * scales[1]


class Bernoulli(nn.Module):
    """Draws random numbers directly instead of through a random module."""

    def __init__(self, num_features: int):
        super().__init__()
        self.linear = nn.Linear(num_features, num_features)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) if self.training else 1
        return self.linear(x * noise) * torch.bernoulli(torch.full_like(x, 0.7 if self.training else 1.0))


class Transposed(nn.Module):
    """Mixes along the second dimension and returns a transposed view."""

    def __init__(self, num_features: int):
        super().__init__()
        self.linear = nn.Linear(num_features, num_features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.transpose(1, 2))).transpose(1, 2)


class Recurrent(nn.Module):
    """A fused recurrent layer, whose kernel decides what to save."""

    def __init__(self, num_features: int):
        super().__init__()
        self.gru = nn.GRU(num_features, num_features, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


def mlp(num_features: int) -> nn.Sequential:
    """Return a smooth function, for numerical derivatives."""
    return nn.Sequential(nn.Linear(num_features, num_features), nn.Tanh(), nn.Linear(num_features, num_features))


def scaling_mlp(num_features: int) -> nn.Sequential:
    """Return a function whose output is a shift and a scale, for the affine coupling."""
    return nn.Sequential(nn.Linear(num_features, num_features), nn.Tanh(), nn.Linear(num_features, 2 * num_features))


@dataclass(frozen=True)
class Case:
    """A kind of block with matching inputs, in float64 for tight tolerances."""

    name: str
    make_block: Callable[[], AbstractReversibleBlock]
    shape: tuple[int, ...]
    args: Callable[[], tuple[Any, ...]] = tuple
    kwargs: Callable[[], dict[str, Any]] = field(default=dict)
    tied: bool = False
    """Whether two blocks share one residual function, which is both functions of the first."""
    dtype: torch.dtype = torch.float64
    density: bool = False
    """Whether the block changes volumes."""

    def sequence(self, depth: int, policy: AbstractPolicy | list[AbstractPolicy] | None = None) -> ReversibleSequential:
        blocks = [self.make_block() for _ in range(depth)]
        if self.tied:
            blocks[0].g = blocks[-1].f = blocks[0].f
        return ReversibleSequential(*blocks, policy=policy or Reverse()).double()

    def input(self, *, requires_grad: bool = True) -> Tensor:
        return torch.randn(self.shape, dtype=self.dtype, requires_grad=requires_grad)


def _attention_block() -> ReversibleBlock:
    return ReversibleBlock(Attention(4), FeedForward(4), split_dim=-1)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


CASES = [
    Case("conv", lambda: ReversibleBlock(ConvResidual(3), ConvResidual(3)), (2, 6, 5, 5)),
    Case(
        "conv-dropout",
        lambda: ReversibleBlock(
            nn.Sequential(ConvResidual(3), nn.Dropout(0.3)), nn.Sequential(nn.Dropout2d(0.3), ConvResidual(3))
        ),
        (2, 6, 5, 5),
    ),
    Case("conv-biased-norm", lambda: ReversibleBlock(BiasedNormResidual(3), BiasedNormResidual(3)), (2, 6, 5, 5)),
    Case("mlp", lambda: ReversibleBlock(mlp(3), mlp(3), split_dim=-1), (4, 6)),
    Case("attention", _attention_block, (2, 5, 8)),
    Case(
        "attention-context-mask",
        _attention_block,
        (2, 5, 8),
        args=lambda: (_leaf(2, 5, 4),),
        kwargs=lambda: {"mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    ),
    Case(
        "spectral-norm",
        lambda: ReversibleBlock(
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            nn.Sequential(nn.Tanh(), nn.Linear(3, 3)),
            split_dim=1,
        ),
        (4, 6),
    ),
    Case(
        "split-batch",
        lambda: ReversibleBlock(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3), split_dim=0),
        (4, 3),
    ),
    Case("tied", lambda: ReversibleBlock(mlp(3), mlp(3)), (4, 6), tied=True),
    Case(
        "tied-batch-norm",
        lambda: ReversibleBlock(
            nn.Sequential(nn.BatchNorm1d(3), mlp(3), nn.Dropout(0.3)), nn.Sequential(nn.BatchNorm1d(3), mlp(3))
        ),
        (4, 6),
        tied=True,
    ),
    Case("averaging", lambda: ReversibleBlock(Averaging(3), Averaging(3)), (4, 6)),
    Case(
        "group-and-instance-norm",
        lambda: ReversibleBlock(
            nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)),
            nn.Sequential(
                nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
            ),
        ),
        (2, 8, 5, 5),
    ),
    Case("random", lambda: ReversibleBlock(Bernoulli(3), nn.Sequential(nn.RReLU(), nn.Linear(3, 3))), (4, 6)),
    Case("transposed", lambda: ReversibleBlock(Transposed(5), Transposed(5), split_dim=-1), (2, 5, 8)),
    Case("recurrent", lambda: ReversibleBlock(Recurrent(4), mlp(4), split_dim=-1), (2, 5, 8)),
    Case(
        "nested-arguments",
        lambda: ReversibleBlock(Conditioned(3), Conditioned(3)),
        (4, 6),
        args=lambda: ({"shifts": [_leaf(4, 3), {"shift": _leaf(3)}]},),
        kwargs=lambda: {"scales": (_leaf(1), 0.5)},
    ),
    Case("affine", lambda: ReversibleBlock(scaling_mlp(3), scaling_mlp(3), coupling=Affine()), (4, 6), density=True),
    Case(
        "affine-conv",
        lambda: CouplingLayer(
            nn.Sequential(ConvResidual(3), nn.Dropout(0.3), nn.Conv2d(3, 6, 1)), coupling=Affine("sigmoid")
        ),
        (2, 6, 5, 5),
        density=True,
    ),
    Case("flow-step", lambda: FlowStep(scaling_mlp(3), num_channels=6), (4, 6), density=True),
    # A grid so fine that its rounding is within the tolerances of the contracts.
    Case(
        "fixed-point-conv",
        lambda: ReversibleBlock(
            nn.Sequential(ConvResidual(3), nn.Dropout(0.3)), ConvResidual(3), coupling=FixedPoint(40, is_wide=True)
        ),
        (2, 6, 5, 5),
    ),
    Case(
        "fixed-point-mlp",
        lambda: ReversibleBlock(mlp(3), mlp(3), split_dim=-1, coupling=FixedPoint(40, is_wide=True)),
        (4, 6),
    ),
    Case("three-streams", lambda: MultiStreamBlock(mlp(2), mlp(2), mlp(2)), (4, 6)),
    Case("three-groups", lambda: GroupedBlock(mlp(2), mlp(2), mlp(2)), (4, 6)),
    Case(
        "four-affine-groups",
        lambda: GroupedBlock(*[scaling_mlp(2) for _ in range(4)], split_dim=-1, coupling=Affine()),
        (4, 8),
        density=True,
    ),
    Case(
        "four-affine-streams",
        lambda: MultiStreamBlock(*[scaling_mlp(2) for _ in range(4)], split_dim=-1, coupling=Affine()),
        (4, 8),
        density=True,
    ),
    Case("scaled", lambda: ReversibleBlock(mlp(3), mlp(3), coupling=Scaled.consistent(-0.8)), (4, 6), density=True),
    Case(
        "midpoint-conv",
        lambda: ReversibleBlock(
            nn.Sequential(ConvResidual(3), nn.Dropout(0.3)), ConvResidual(3), coupling=Scaled.midpoint()
        ),
        (2, 6, 5, 5),
    ),
    Case(
        "three-scaled-streams",
        lambda: MultiStreamBlock(mlp(2), mlp(2), mlp(2), coupling=Scaled.dual(0.1, 0.9)),
        (4, 6),
        density=True,
    ),
    Case(
        "fixed-point-midpoint",
        lambda: ReversibleBlock(mlp(3), mlp(3), coupling=ExactScaled(Scaled.midpoint(), 40, is_wide=True)),
        (4, 6),
    ),
    Case("leapfrog", lambda: LeapfrogBlock(mlp(3), step_size=0.5), (4, 6)),
    Case("momentum", lambda: MomentumBlock(mlp(3), gamma=0.8), (4, 6), density=True),
    Case(
        "complex",
        lambda: ReversibleBlock(
            nn.Sequential(nn.Linear(3, 3, dtype=torch.complex128), nn.Tanh()),
            nn.Linear(3, 3, dtype=torch.complex128),
        ),
        (4, 6),
        dtype=torch.complex128,
    ),
]

SAMPLE = 0
"""Bytes of tensors that a run on the CPU keeps for its drift check, at any depth: it keeps plain numbers."""

CASE = {case.name: case for case in CASES}

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

DEPTH = 4


def keep_all(context, operator, *args, **kwargs):
    """Keep every output, as a rule of `Reverse(keep=...)`."""
    return True


REVERSING_POLICIES = {
    "reverse": Reverse(),
    "mixed": [Reverse(), Store(), Reverse(), Reverse()],
    "checkpoint": Checkpoint(),
    "all-kinds": [Reverse(), Checkpoint(), Offload(), Store()],
    "kept": Reverse(keep=keep_all),
    "held": [Reverse(hold=True, keep=keep_all), Reverse(), Reverse(hold=True), Reverse(hold=True, keep="64MiB")],
}
all_policies = pytest.mark.parametrize("policy", REVERSING_POLICIES.values(), ids=REVERSING_POLICIES.keys())

# Small models with both blocks and both stems. tests/models compares the published networks with their twins.
REVERSIBLE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "revnet38": partial(create_model, "revnet38"),
    "bottleneck": partial(RevNet, num_blocks=(1, 2), widths=(4, 4, 8), block="bottleneck"),
    "large-stem": partial(RevNet, num_blocks=(2, 2), widths=(4, 6, 8), stem="large"),
    "irevnet": partial(IRevNet, num_blocks=(3, 2), strides=(1, 2), hidden_widths=(4, 6)),
    "vit": partial(
        ReversibleViT,
        img_size=32,
        patch_size=8,
        dim=8,
        depth=3,
        num_heads=2,
        num_classes=10,
        dropout=0.1,
        drop_path=0.2,
    ),
}
for _attention in ("full", "lsh", "hierarchical"):
    REVERSIBLE_MODELS[f"transformer-{_attention}"] = partial(
        ReversibleTransformer,
        vocab_size=10,
        dim=8,
        depth=3,
        num_heads=2,
        attention=_attention,
        bucket_size=4,
        block_size=4,
        dropout=0.1,
    )
for _form in ("midpoint", "leapfrog"):
    REVERSIBLE_MODELS[f"transformer-{_form}"] = partial(
        ReversibleTransformer,
        vocab_size=10,
        dim=8,
        depth=3,
        num_heads=2,
        form=_form,
        num_kv_heads=1,
        norm="rms",
        mlp="swiglu",
        dropout=0.1,
    )
all_reversible_models = pytest.mark.parametrize("make_model", REVERSIBLE_MODELS.values(), ids=REVERSIBLE_MODELS.keys())


def model_input(model: nn.Module) -> Tensor:
    """Return images in float64, or tokens."""
    if isinstance(model, ReversibleTransformer):
        return torch.randint(10, (2, 50))
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def squares(y: Tensor) -> Tensor:
    """Return the sum of squares, which is real for complex outputs too."""
    return (torch.view_as_real(y) if y.is_complex() else y).square().sum()


def leaves(values: Any) -> list[Tensor]:
    """Return the tensors in a nested structure."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def residual_functions(block: AbstractReversibleBlock) -> list[nn.Module]:
    """Return the functions of a block that have parameters."""
    functions = [half_block.function for half_block in block.half_blocks()]
    return [function for function in functions if list(function.parameters())]


def stored_twin(sequence: ReversibleSequential) -> ReversibleSequential:
    """Return a copy of the blocks that stores all activations, the reference of all comparisons."""
    return ReversibleSequential(*copy.deepcopy(list(sequence)), policy=Store())


def assert_close(actual: Any, expected: Any, *, tolerance: float = 1e-9) -> None:
    """Check equality up to the rounding of a reconstruction in float64, a few hundred units in the last place."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@contextmanager
def right_or_raises(message: str) -> Iterator[None]:
    """Check that the assertions in the block hold, or that an error says what is not supported."""
    try:
        yield
    except RuntimeError as error:
        if message not in str(error):
            raise


def assert_trains_as_twin(
    sequence: ReversibleSequential, case: Case, step: Callable[..., object], *, tolerance: float = 1e-9
) -> None:
    """Check that `step(module, x, args, kwargs)` has the same effects as on the stored twin.

    Gradients of the parameters, the input and the arguments, and the result of `step`, must be equal up to rounding;
    the buffers and the random state must be identical. Both start with the same random state.
    """
    twin = stored_twin(sequence)
    inputs = (case.input(), case.args(), case.kwargs())
    twin_inputs = copy.deepcopy(inputs)
    returned, states = [], []
    for module, arguments in ((sequence, inputs), (twin, twin_inputs)):
        torch.manual_seed(1)
        returned.append(step(module, *arguments))
        states.append(torch.get_rng_state())
    assert_close(leaves(returned[0]), leaves(returned[1]), tolerance=tolerance)
    for leaf, twin_leaf in zip(leaves(inputs), leaves(twin_inputs), strict=True):
        assert_close(leaf.grad, twin_leaf.grad, tolerance=tolerance)
    assert_close(gradients(sequence), gradients(twin), tolerance=tolerance)
    assert_same_buffers(sequence, twin)
    assert torch.equal(*states)


def assert_same_buffers(module: nn.Module, twin: nn.Module) -> None:
    for (name, buffer), (_, expected) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


class Outside(nn.Module):
    """Scales by a random number from outside PyTorch, which a replay cannot repeat."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * random.random())


def assert_outside_randomness_raises(place: int, device: str = "cpu") -> None:
    """Check that the error names function number `place` of two blocks."""
    functions = [Outside(4) if place == number else mlp(4) for number in range(4)]
    blocks = [ReversibleBlock(*functions[start : start + 2], split_dim=-1) for start in (0, 2)]
    sequence = ReversibleSequential(*blocks).to(device)
    name = rf"blocks\.{place // 2}\.{'fg'[place % 2]}"
    with pytest.raises(ReconstructionError, match=f"`{name}` returned different numbers"):
        sequence(torch.randn(3, 8, device=device)).square().sum().backward()


def assert_silent_write_raises(device: str = "cpu") -> None:
    """Check that a write to the output without a version change is detected."""
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4), split_dim=-1) for _ in range(2)]).to(device)
    y = sequence(torch.randn(3, 8, device=device))
    loss = y.square().sum()
    y.data.zero_()
    with pytest.raises(ReconstructionError, match="overwritten after the forward pass"):
        loss.backward()


# Figures --------------------------------------------------------------------------------------------------------------


def keep_saved_figures(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Any]:
    """Return a list that fills with the figures that `module` saves, by the function `save` that it imports."""
    figures: list[Any] = []
    save = module.save

    def keep_and_save(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(module, "save", keep_and_save)
    return figures


def texts_of(figure: Any) -> list[str]:
    """Return the texts inside the first axes of a figure."""
    return [text.get_text() for text in figure.axes[0].texts]


def assert_something_is_drawn(path: Path) -> None:
    """A picture of the usual size that is not blank, and no other file next to it."""
    import matplotlib.image

    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05
    assert [file.name for file in path.parent.iterdir()] == [path.name]
