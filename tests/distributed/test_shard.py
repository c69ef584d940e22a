"""`shard_blocks` in two processes: gradients, the precision of streams, and bytes."""

import copy
import math
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from revnet import (
    FixedPoint,
    ReconstructionError,
    ReconstructionWarning,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    set_coupling,
)
from revnet.bench._resized_bytes import ResizedBytes
from revnet.coupling import AbstractCoupling
from revnet.distributed import shard_blocks
from revnet.models import IRevNet, ResNet, ReversibleTransformer, ReversibleViT, RevNet
from tests.distributed.gradients import assert_same_gradients, gradient_error, whole
from tests.distributed.processes import assert_all_pass, assert_passed, run_checks
from tests.helpers import CASE, Case, assert_close, squares

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
UNITS = ("block", "function")
CASES = ("conv-dropout", "mlp", "attention", "spectral-norm", "tied", "tied-batch-norm", "affine-conv", "momentum")
BUFFERS_MUST_MATCH = {"spectral-norm"}
"""Cases whose function multiplies its buffers with its parameters, which must then have the same dtype."""


class Network(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self, depth: int = 3, **options: Any):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = ReversibleSequential(
            *[ReversibleBlock(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)) for _ in range(depth)],
            **options,
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))


class OneByOne(Network):
    """Calls its blocks one by one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Scaled(AbstractCoupling, nn.Module):
    """A coupling with a parameter."""

    is_additive = False

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.tensor([1.25]))

    def prepare(self, x):
        return x

    def forward(self, x, residual, name="f"):
        return x * self.scale + residual

    def inverse(self, y, residual, name="f"):
        return (y - residual) / self.scale

    def log_det(self, x, residual):
        return None

    def limit(self, dtype):
        return None


def tied_weights() -> Network:
    """Return a network in which two blocks share a weight, and another block shares one with the head."""
    model = Network(4)
    model.blocks[0].f[0].weight = model.blocks[2].f[0].weight
    model.head.extra = model.blocks[1].g.bias
    return model


def parametrized_coupling() -> Network:
    model = Network()
    for block in model.blocks:
        block.coupling = Scaled()
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "vit": (
        lambda: ReversibleViT(img_size=8, patch_size=4, dim=8, depth=3, num_heads=2, num_classes=5),
        lambda: torch.randn(2, 3, 8, 8),
    ),
    "transformer": (
        lambda: ReversibleTransformer(vocab_size=11, dim=8, depth=3, num_heads=2),
        lambda: torch.randint(11, (2, 6)),
    ),
    "lsh": (
        lambda: ReversibleTransformer(vocab_size=11, dim=8, depth=2, num_heads=2, attention="lsh", bucket_size=4),
        lambda: torch.randint(11, (2, 16)),
    ),
    "revnet": (lambda: RevNet(num_blocks=(2, 2), widths=(4, 6, 8)), lambda: torch.randn(2, 3, 8, 8)),
    "irevnet": (
        lambda: IRevNet(num_blocks=(2, 2), strides=(1, 2), hidden_widths=(4, 6)),
        lambda: torch.randn(2, 3, 8, 8),
    ),
    "resnet": (lambda: ResNet(num_blocks=(1, 1), widths=(4, 4, 8)), lambda: torch.randn(2, 3, 8, 8)),
    "network": (Network, lambda: torch.randn(3, 6)),
    "blocks one by one": (OneByOne, lambda: torch.randn(3, 6)),
    "tied weights": (tied_weights, lambda: torch.randn(3, 6)),
    "coupling with a parameter": (parametrized_coupling, lambda: torch.randn(3, 6)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def make_input(name: str, rank: int | None = None) -> Tensor:
    """Return a different batch in each process."""
    torch.manual_seed(10 + (dist.get_rank() if rank is None else rank))
    return MODELS[name][1]()


def make_stored(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "set_policies"):
            module.set_policies(Store())
    return model


def step(model: nn.Module, x: Tensor, num: int = 2) -> Tensor:
    torch.manual_seed(dist.get_rank())
    for _ in range(num):
        y = model(x)
        squares(y.float() if y.dtype == torch.bfloat16 else y).backward()
    return y.detach()


def stream_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return a set that collects the dtypes of the streams that functions read. Call it before sharding."""
    dtypes: set[torch.dtype] = set()
    for block in model.modules():
        if isinstance(block, ReversibleBlock):
            for function in (block.f, block.g):
                function.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    return dtypes


def assert_same_bits(model: nn.Module, twin: nn.Module) -> None:
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(parameter.grad), whole(expected.grad))
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)


# ------------------------------------------------------------------------------------------------------- gradients


def check_model(name: str, unit: str) -> None:
    """Check against the stored twin, sharded in the same way, and without batch norm against a single process."""
    model = make(name).double()
    twin, alone = make_stored(copy.deepcopy(model)), copy.deepcopy(model)
    x = make_input(name)
    x = x.double() if x.is_floating_point() else x
    for module in (model, twin):
        step(shard_blocks(module, unit=unit), x)
    assert_same_gradients(model, twin)
    if name in ("vit", "transformer", "network"):
        batches = [make_input(name, rank) for rank in range(dist.get_world_size())]
        x = torch.cat([batch.double() if batch.is_floating_point() else batch for batch in batches])
        step(alone, x)
        assert_same_gradients(model, alone, 1 / dist.get_world_size())


def check_case(name: str, unit: str) -> None:
    case: Case = CASE[name]
    torch.manual_seed(0)
    model = nn.Sequential(case.sequence(3))
    twin = make_stored(copy.deepcopy(model))
    torch.manual_seed(10 + dist.get_rank())
    x = case.input(requires_grad=False)
    for module in (model, twin):
        step(shard_blocks(module, unit=unit), x)
    assert_same_gradients(model, twin)


def check_options(**options: Any) -> None:
    if "mesh" in options:
        options["mesh"] = init_device_mesh("cpu", options["mesh"], mesh_dim_names=("replicate", "shard"))
    model, x = make("network"), make_input("network")
    twin = make_stored(copy.deepcopy(model))
    for module in (model, twin):
        step(shard_blocks(module, **options), x)
    assert gradient_error(model, twin) < 100 * torch.finfo(torch.float32).eps


def check_accumulation() -> None:
    model = make("network").double()
    alone = copy.deepcopy(model)
    shard_blocks(model)
    for number in range(2):
        model.set_requires_gradient_sync(number == 1)
        for module in (model, alone):
            squares(module(torch.full((3, 6), 1.0 + number, dtype=torch.float64))).backward()
    assert_same_gradients(model, alone)


def check_clipping(name: str) -> None:
    model = make(name).double().eval()
    alone = copy.deepcopy(model)
    x = make_input(name, rank=0)
    x = x.double() if x.is_floating_point() else x
    norms = []
    for module in (shard_blocks(model), alone):
        step(module, x)
        norms.append(whole(nn.utils.clip_grad_norm_(module.parameters(), 0.01)))
    assert_close(norms[0], norms[1])
    assert norms[1] > 0.01
    assert_same_gradients(model, alone)


# ------------------------------------------------------------------------------------------------------- precision


def check_streams_stay_in_float32(name: str, unit: str) -> None:
    model = make(name)
    dtypes, x = stream_dtypes(model), make_input(name)
    twin = make_stored(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReconstructionWarning)
        outputs = [step(shard_blocks(module, mp_policy=BF16, unit=unit), x) for module in (model, twin)]
    assert outputs[0].dtype == torch.bfloat16
    assert dtypes <= {torch.float32}
    assert torch.equal(*outputs)
    # Replays round the rebuilt streams to bfloat16, which almost always gives the same bits.
    assert gradient_error(model, twin) < 1e-4


def check_exact_streams(name: str, unit: str) -> None:
    model = make(name)
    set_coupling(model, FixedPoint(is_wide=unit == "function"))
    twin, x = make_stored(copy.deepcopy(model)), make_input(name)
    for module in (model, twin):
        step(shard_blocks(module, mp_policy=BF16, unit=unit), x)
    assert_same_bits(model, twin)


def check_case_in_low_precision(name: str, unit: str) -> None:
    case: Case = CASE[name]
    torch.manual_seed(0)
    model = nn.Sequential(case.sequence(3)).float()
    twin = make_stored(copy.deepcopy(model))
    torch.manual_seed(10 + dist.get_rank())
    x = case.input(requires_grad=False).float()
    outputs = [step(shard_blocks(module, mp_policy=BF16, unit=unit), x) for module in (model, twin)]
    assert outputs[0].dtype == torch.float32, "nothing but blocks reads or returns streams"
    assert gradient_error(model, twin) < 1e-4


def check_parameters_of_16_bits() -> None:
    """Check a model that is in bfloat16 itself, without a policy."""
    model = make("network").bfloat16()
    dtypes, twin = stream_dtypes(model), make_stored(copy.deepcopy(model))
    for module in (model, twin):
        step(shard_blocks(module), make_input("network").bfloat16())
    assert dtypes <= {torch.float32}
    assert gradient_error(model, twin) < 1e-2  # a unit of bfloat16, in which gradients are added up


def check_own_sharding_is_as_before() -> None:
    """Check that blocks which the user shards in bfloat16 still warn or raise."""
    x = torch.randn(3, 8)
    warns = pytest.warns(ReconstructionWarning, match=r"torch\.bfloat16.*with FSDP2, `revnet.distributed.shard_blocks`")
    raises = pytest.raises(RuntimeError, match=r"replaced its input: it cast .*`revnet.distributed.shard_blocks\(model")
    raises_later = pytest.raises(RuntimeError, match=r"replaced its output: it cast .*`revnet.distributed.shard_blocks")
    widens = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for coupling, dtype, policy, outcomes in (
        (None, torch.bfloat16, BF16, [warns]),
        (None, None, BF16, [raises]),
        (FixedPoint(), None, BF16, [raises]),
        (None, torch.bfloat16, widens, [warns, raises_later]),
    ):
        blocks = make("network").blocks
        if coupling is not None:
            set_coupling(blocks, coupling)
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(blocks)
        with ExitStack() as stack:
            for outcome in outcomes:
                stack.enter_context(outcome)
            blocks(x.to(dtype))


def check_norms_keep_their_precision() -> None:
    model = shard_blocks(make("revnet"), mp_policy=BF16)
    step(model, make_input("revnet"))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(isinstance(norm, FSDPModule) for norm in norms)
    assert all(norm.running_mean.dtype == torch.float32 for norm in norms)
    assert all(norm.num_batches_tracked == 2 for norm in norms), "a replay does not update the statistics"


# ----------------------------------------------------------------------------------------------------------- bytes


def share(parameter: Tensor, shape: torch.Size) -> int:
    """Return the bytes of this process's rows of a parameter: the first processes have the larger parts."""
    rows = math.ceil(shape[0] / dist.get_world_size())
    mine = min(max(shape[0] - dist.get_rank() * rows, 0), rows)
    return mine * math.prod(shape[1:]) * parameter.element_size()


def check_bytes(name: str, unit: str) -> None:
    """Check that parameters, gradients and optimizer state are divided, to the byte."""
    model = make(name)
    shapes = [parameter.shape for parameter in model.parameters()]
    shard_blocks(model, unit=unit)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    step(model, make_input(name))
    optimizer.step()
    expected = [share(parameter, shape) for parameter, shape in zip(parameters, shapes, strict=True)]
    assert [parameter.to_local().nbytes for parameter in parameters] == expected
    assert [parameter.grad.to_local().nbytes for parameter in parameters] == expected
    for parameter, num_bytes in zip(parameters, expected, strict=True):
        state = optimizer.state[parameter]
        assert sum(whole_or_part.to_local().nbytes for whole_or_part in (state["exp_avg"], state["exp_avg_sq"])) == (
            2 * num_bytes
        )
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def settled(counter: ResizedBytes) -> int:
    """Return the bytes that are alive after a pause, since gloo's threads hold on to their buffers for a while."""
    time.sleep(0.02)
    return counter.live_bytes


def held_bytes(depth: int, unit: str, policy: MixedPrecisionPolicy | None, *, stored: bool = False) -> int:
    """Return the bytes that a forward pass holds."""
    torch.manual_seed(0)
    model = ReversibleTransformer(vocab_size=11, dim=8, depth=depth, num_heads=2)
    if stored:
        make_stored(model)
    shard_blocks(model, unit=unit, mp_policy=policy)
    x = torch.zeros(4, 16, dtype=torch.long)
    step(model, x)
    with ResizedBytes() as counter:
        y = model(x)
    held = min(settled(counter) for _ in range(5))
    squares(y.float()).backward()
    return held


def check_held_bytes(unit: str, policy: MixedPrecisionPolicy | None) -> None:
    assert held_bytes(2, unit, policy) == held_bytes(7, unit, policy)
    assert held_bytes(7, unit, policy, stored=True) > 2 * held_bytes(7, unit, policy)


def check_inverse() -> None:
    """Check the inverse with sharded functions, which it calls; it does not call the blocks."""
    blocks = make("network").blocks.double()
    shard_blocks(blocks, unit="function")
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_close(blocks.inverse(blocks(x).detach()), x)


class Density(nn.Module):
    """Returns the log-determinants of its blocks with their output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = CASE["affine-conv"].sequence(2)

    def forward(self, x: Tensor) -> Tensor:
        z, log_det = self.blocks.forward_with_log_det(x)
        return z.flatten(1).square().sum(1) - log_det


def check_log_det(unit: str) -> None:
    """Check that the gradient of a log-determinant finds the parameters, which may come first."""
    torch.manual_seed(0)
    model = Density()
    twin = make_stored(copy.deepcopy(model))
    torch.manual_seed(1)
    x = CASE["affine-conv"].input(requires_grad=False)
    for module in (model, twin):
        shard_blocks(module, unit=unit)
        torch.manual_seed(2)
        module(x).mean().backward()
    assert_same_gradients(model, twin)


def check_generation() -> None:
    model = make("transformer").eval()
    prompt = torch.zeros(1, 2, dtype=torch.long)
    expected = model.generate(prompt, 4, temperature=0)
    register_fsdp_forward_method(shard_blocks(model), "generate")
    assert torch.equal(model.generate(prompt, 4, temperature=0), expected)


def check_sharded_head_keeps_its_group() -> None:
    model = make("network").double()
    twin = copy.deepcopy(model)
    head = fully_shard(model.head)
    shard_blocks(model)
    for module in (model, twin):
        squares(module(torch.ones(3, 6, dtype=torch.float64))).backward()
    assert_same_gradients(model, twin)
    assert model.head is head


def check_refuses_compiled_functions() -> None:
    model = make("network")
    for block in model.blocks:
        block.compile(backend="eager")
    with pytest.raises(ValueError, match=r'`unit` \(=\'function\'\) would run .*`unit="block"`'):
        shard_blocks(model, unit="function")


def check_needs_a_block() -> None:
    with pytest.raises(ValueError, match=r"`model` \(=Linear\) has no reversible block"):
        shard_blocks(nn.Linear(2, 2))


class Shift(nn.Module):
    """Saves nothing for its backward pass, so there is nothing to rebuild."""

    def __init__(self, width: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def with_functions_that_save_nothing(kind: str) -> Network:
    torch.manual_seed(0)
    network = Network()
    for block in network.blocks:
        if kind == "shift":
            block.f = Shift(4)
        elif kind == "bias":  # Saves only its weight.
            block.f = nn.Linear(4, 4)
            block.f.weight.requires_grad_(False)
        else:
            block.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Shift(4))
    return network.double()


def check_functions_that_save_nothing(kind: str) -> None:
    """They run again when FSDP has finished their backward pass."""
    model = with_functions_that_save_nothing(kind)
    alone = copy.deepcopy(model)
    if kind == "last layer":
        for module in list(model.blocks.modules()):
            if isinstance(module, nn.Linear | Shift):
                fully_shard(module)
        fully_shard(model)
    else:
        shard_blocks(model, unit="function")
    for number in range(2):
        x = torch.full((3, 6), 1.0 + number, dtype=torch.float64)
        for module in (model, alone):
            step(module, x)
        assert_same_gradients(model, alone)
        for module in (model, alone):
            optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            assert_close(model(x), alone(x))


def check_refuses_blocks_whose_function_saves_nothing(kind: str) -> None:
    model = shard_blocks(with_functions_that_save_nothing(kind), unit="block")
    with pytest.raises(ReconstructionError, match=r"`blocks.2.f` must run again, but FSDP has freed .*unit="):
        step(model, torch.ones(3, 6, dtype=torch.float64))


def check_refuses_a_second_call() -> None:
    model = shard_blocks(make("network"))
    with pytest.raises(ValueError, match="is already sharded"):
        shard_blocks(model)


Kind = tuple[str, Callable[[str, str], None], Sequence[str], Sequence[str]]
KINDS: list[Kind] = [
    ("gradients", check_model, list(MODELS), list(MODELS)),
    ("gradients, case", check_case, CASES, CASES),
    ("streams in float32", check_streams_stay_in_float32, list(MODELS), ("vit", "revnet", "tied weights")),
    (
        "streams in float32, case",
        check_case_in_low_precision,
        [name for name in CASES if name not in BUFFERS_MUST_MATCH],
        ("conv-dropout", "tied", "affine-conv"),
    ),
    ("exact streams", check_exact_streams, ("vit", "revnet", "irevnet", "network"), ("vit", "revnet")),
]
"""Checks that run for each model or case with both units. For those named last, one unit is a quick test."""
PAIRS = {
    f"{kind}, {name}, {unit}": partial(check, name, unit)
    for kind, check, names, _ in KINDS
    for name in names
    for unit in UNITS
}
QUICK_PAIRS = [
    f"{kind}, {name}, {unit}"
    for kind, _, names, quick in KINDS
    for name, unit in zip(names, cycle(UNITS))
    if name in quick
]
CHECKS = {
    **{name: PAIRS[name] for name in QUICK_PAIRS},
    "kept whole after forward": partial(check_options, reshard_after_forward=False),
    "replicated and sharded": partial(check_options, mesh=(1, 2)),
    "replicated": partial(check_options, mesh=(2, 1)),
    "accumulation": check_accumulation,
    **{f"clipping, {name}": partial(check_clipping, name) for name in ("vit", "revnet")},
    "parameters of 16 bits": check_parameters_of_16_bits,
    "own sharding is as before": check_own_sharding_is_as_before,
    "norms keep their precision": check_norms_keep_their_precision,
    **{
        f"bytes, {name}, {unit}": partial(check_bytes, name, unit)
        for name, unit in zip(("vit", "revnet"), UNITS, strict=True)
    },
    **{
        f"held bytes, {unit}, {'float32' if policy is None else 'bfloat16'}": partial(check_held_bytes, unit, policy)
        for unit, policy in zip(UNITS, (None, BF16), strict=True)
    },
    "inverse": check_inverse,
    **{f"log-determinant, {unit}": partial(check_log_det, unit) for unit in UNITS},
    "generation": check_generation,
    "sharded head": check_sharded_head_keeps_its_group,
    **{
        f"functions that save nothing, {kind}": partial(check_functions_that_save_nothing, kind)
        for kind in ("shift", "bias", "last layer")
    },
    **{
        f"refuses blocks whose function saves nothing, {kind}": partial(
            check_refuses_blocks_whose_function_saves_nothing, kind
        )
        for kind in ("shift", "bias")
    },
    "refuses a model without blocks": check_needs_a_block,
    "refuses compiled functions": check_refuses_compiled_functions,
    "refuses a second call": check_refuses_a_second_call,
}
OTHER_PAIRS = {name: check for name, check in PAIRS.items() if name not in QUICK_PAIRS}
BYTES = {name: check for name, check in CHECKS.items() if "bytes" in name}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_checks(__name__, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name, outcomes):
    assert_passed(outcomes, name)


@pytest.mark.slow
def test_other_pairs_in_two_processes(tmp_path):
    assert_all_pass(__name__, tmp_path, name="OTHER_PAIRS")


@pytest.mark.slow
def test_bytes_in_four_processes(tmp_path):
    assert_all_pass(__name__, tmp_path, 4, "BYTES")


@pytest.mark.slow
def test_script_of_the_page_runs(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "several-gpus.md"
    (script,) = re.findall(r"```py\n(# train\.py.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="`shard_blocks` needs a process group; start the program with `torchrun`"):
        shard_blocks(Network())
