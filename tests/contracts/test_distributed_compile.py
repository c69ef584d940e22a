"""`torch.compile` together with DDP and FSDP2, for whole models and by block, in two processes.

Gradients equal the eager ones, and the forward pass holds no more than the memory that compiling costs on one process.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from revnet import FixedPoint, ReversibleSequential, Store, set_coupling
from revnet.distributed import shard_blocks
from revnet.models import ReversibleTransformer
from tests.distributed.gradients import assert_same_gradients, gradient_error
from tests.distributed.processes import assert_all_pass, assert_passed, run_checks
from tests.helpers import CASE, squares

DEPTH = 3
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


class WithStem(nn.Module):
    """A sequence behind a layer of its own."""

    def __init__(self, sequence: ReversibleSequential):
        super().__init__()
        self.stem = nn.Linear(6, 6, dtype=torch.float64)
        self.sequence = sequence

    def forward(self, x: Tensor) -> Tensor:
        return squares(self.sequence(self.stem(x)))


class Counting:
    """A backend that counts the graphs that it compiles, and their runs."""

    def __init__(self) -> None:
        self.num_graphs = self.num_runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.num_graphs += 1
        compiled = aot_eager(graph, inputs)

        def run(*args: Any) -> Any:
            self.num_runs += 1
            return compiled(*args)

        return run


Wrap = Callable[[nn.Module, Any], nn.Module]


def compile_in_place(modules: Any, backend: Any) -> None:
    for module in modules:
        module.compile(backend=backend)


def ddp_of_compiled(model: nn.Module, backend: Any) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend=backend))


def compiled_ddp(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend=backend)


def ddp_with_compiled_sequence(model: nn.Module, backend: Any) -> nn.Module:
    model.sequence.compile(backend=backend)
    return DistributedDataParallel(model)


def ddp_with_compiled_blocks(model: nn.Module, backend: Any) -> nn.Module:
    compile_in_place(model.sequence, backend)
    return DistributedDataParallel(model)


def compiled_blocks_then_sharded(model: nn.Module, backend: Any) -> nn.Module:
    compile_in_place(model.sequence, backend)
    return shard_blocks(model)


def sharded_then_compiled_blocks(model: nn.Module, backend: Any) -> nn.Module:
    shard_blocks(model)
    compile_in_place(model.sequence, backend)
    return model


def compiled_blocks_then_own_sharding(model: nn.Module, backend: Any) -> nn.Module:
    compile_in_place(model.sequence, backend)
    for block in model.sequence:
        fully_shard(block)
    return fully_shard(model)


WHOLE: dict[str, Wrap] = {
    "DDP of a compiled model": ddp_of_compiled,
    "compiled DDP": compiled_ddp,
    "DDP with a compiled sequence": ddp_with_compiled_sequence,
}
BY_BLOCK: dict[str, Wrap] = {
    "DDP with compiled blocks": ddp_with_compiled_blocks,
    "compiled blocks, then sharded": compiled_blocks_then_sharded,
    "sharded, then compiled blocks": sharded_then_compiled_blocks,
    "compiled blocks, then own sharding": compiled_blocks_then_own_sharding,
}


def make_model(name: str = "mlp", depth: int = DEPTH) -> WithStem:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return WithStem(CASE[name].sequence(depth))


def make_input() -> Tensor:
    torch.manual_seed(10 + torch.distributed.get_rank())
    return CASE["mlp"].input(requires_grad=False)


def eager(wrap: Wrap) -> Wrap:
    """Return the same wrapper without compilation."""
    is_sharded = "shard" in wrap.__name__
    return lambda model, _: shard_blocks(model) if is_sharded else DistributedDataParallel(model)


def step(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(2):
        model(x).backward()


def check_gradients(wrap: Wrap, name: str, num_graphs: int, runs_per_step: int) -> None:
    model = make_model(name)
    twin, x, backend = copy.deepcopy(model), make_input(), Counting()
    step(wrap(model, backend), x)
    step(eager(wrap)(twin, None), x)
    assert_same_gradients(model, twin)
    assert (backend.num_graphs, backend.num_runs) == (num_graphs, 2 * runs_per_step), "it was compiled"


def check_exact(wrap: Wrap) -> None:
    """Check that exact reversal equals the stored twin bit for bit."""
    model = make_model()
    set_coupling(model, FixedPoint(is_wide=True))
    twin, x = copy.deepcopy(model), make_input()
    twin.sequence.set_policies(Store())
    for module in (model, twin):
        torch._dynamo.reset()
        step(wrap(module, "aot_eager"), x)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def check_low_precision() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ReversibleTransformer(vocab_size=11, dim=8, depth=2, num_heads=2)
    twin, backend = copy.deepcopy(model), Counting()
    tokens = torch.randint(11, (2, 6))
    compile_in_place(model.blocks, backend)
    for module in (model, twin):
        shard_blocks(module, mp_policy=BF16)
        squares(module(tokens).float()).backward()
    assert backend.num_runs > 0
    # Compiled graphs round some intermediate results to bfloat16 that eager kernels do not round, or the reverse.
    assert gradient_error(model, twin) < 1e-2


def check_inductor() -> None:
    model = make_model()
    twin, x = copy.deepcopy(model), make_input()
    step(compiled_blocks_then_sharded(model, "inductor"), x)
    step(shard_blocks(twin), x)
    assert_same_gradients(model, twin)


def held_bytes(wrap: Wrap, backend: Any, depth: int) -> int:
    """Return the bytes that autograd saves in a forward pass, without the parameters of the model."""
    model = make_model(depth=depth)
    wrapped, x = wrap(model, backend), make_input()
    step(wrapped, x)
    saved: dict[int, int] = {}
    own = {
        parameter.untyped_storage().data_ptr() for parameter in model.parameters() if type(parameter) is nn.Parameter
    }

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        wrapped(x)
    return sum(saved.values())


def check_memory(wrap: Wrap) -> None:
    assert held_bytes(wrap, "aot_eager", 2) == held_bytes(wrap, "aot_eager", 5)


def check_refusal(wrap: Wrap) -> None:
    model = make_model()
    with pytest.raises(
        Exception, match=r"sharded parameters \(FSDP\) cannot be compiled as a whole; call `block\.comp"
    ):
        wrap(model, "aot_eager")(make_input())


def compiled_after_sharding(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(shard_blocks(model), backend=backend)


def sequence_compiled_before_sharding(model: nn.Module, backend: Any) -> nn.Module:
    model.sequence.compile(backend=backend)
    return shard_blocks(model)


ALL = WHOLE | BY_BLOCK
QUICK = ("DDP of a compiled model", "DDP with compiled blocks", "compiled blocks, then sharded")
ALL_CHECKS = {
    **{
        f"gradients, {way}, {name}": partial(check_gradients, wrap, name, 1, 1)
        for way, wrap in WHOLE.items()
        for name in ("mlp", "affine")
    },
    # One graph serves all functions, which have the same structure. Each runs twice, the second time in a replay.
    **{f"gradients, {way}, mlp": partial(check_gradients, wrap, "mlp", 1, 4 * DEPTH) for way, wrap in BY_BLOCK.items()},
    **{f"exact, {way}, mlp": partial(check_exact, wrap) for way, wrap in ALL.items() if "DDP" in way},
    **{f"memory, {way}, mlp": partial(check_memory, wrap) for way, wrap in ALL.items()},
}
SLOW_CHECKS = {
    name: check
    for name, check in ALL_CHECKS.items()
    if not any(f", {way}, mlp" in name for way in QUICK) or "exact, DDP of" in name
}
CHECKS = {
    **{name: check for name, check in ALL_CHECKS.items() if name not in SLOW_CHECKS},
    "low precision": check_low_precision,
    "inductor": check_inductor,
    "refuses to compile a sharded model": partial(check_refusal, compiled_after_sharding),
    "refuses a sequence compiled before sharding": partial(check_refusal, sequence_compiled_before_sharding),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_checks(__name__, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name, outcomes):
    assert_passed(outcomes, name)


@pytest.mark.slow
def test_the_other_ways_in_two_processes(tmp_path):
    assert_all_pass(__name__, tmp_path, name="SLOW_CHECKS")
