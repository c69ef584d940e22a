"""Two processes on the CPU: gradients equal the stored twin and a single process, and arrive block by block.

All checks run in one pair of processes, since starting the pair takes longer than running the checks. Each check is a
separate test.
"""

import copy
import warnings
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from revnet import (
    FixedPoint,
    ReconstructionWarning,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    set_coupling,
    set_tolerance,
)
from revnet.bench._resized_bytes import ResizedBytes
from revnet.optim import StepInBackward
from tests.distributed.gradients import assert_same_gradients, whole
from tests.distributed.processes import assert_all_pass, assert_passed, run_checks
from tests.helpers import CASE, REVERSING_POLICIES, mlp, squares

NUM_PROCESSES = 2
DEPTH = 4


class WithHead(nn.Module):
    """A sequence between other layers; some parameters may go unused."""

    def __init__(self, sequence: ReversibleSequential, num_unused: int = 0):
        super().__init__()
        self.sequence = sequence
        self.unused = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(num_unused)])

    def forward(self, x):
        return squares(self.sequence(x))


def make_model(name: str, *, num_unused: int = 0, policy: str = "reverse") -> WithHead:
    torch.manual_seed(0)
    return WithHead(CASE[name].sequence(DEPTH, REVERSING_POLICIES[policy]), num_unused)


def twin_of(model: WithHead) -> WithHead:
    twin = copy.deepcopy(model)
    twin.sequence.set_policies(Store())
    return twin


def process_input(name: str, rank: int | None = None) -> torch.Tensor:
    """Return a different batch in each process."""
    torch.manual_seed(10 + (dist.get_rank() if rank is None else rank))
    return CASE[name].input(requires_grad=False)


def single_process_gradients(model: nn.Module, name: str) -> nn.Module:
    """Return the twin's gradients for the batches of all processes."""
    twin = twin_of(model)
    twin(torch.cat([process_input(name, rank) for rank in range(NUM_PROCESSES)])).backward()
    return twin


# ---------------------------------------------------------------------------------------- data parallel


def check_data_parallel(name: str, num_unused: int, options: dict[str, bool], policy: str = "reverse") -> None:
    model = make_model(name, num_unused=num_unused, policy=policy)
    twin = twin_of(model)
    x = process_input(name)
    for module in (model, twin):
        parallel = DistributedDataParallel(module, **options)
        torch.manual_seed(dist.get_rank())
        for _ in range(3):
            parallel(x).backward()
    assert_same_gradients(model, twin)


def check_exact_reversal(name: str) -> None:
    """Check that every bit is equal after the gradients of both processes are summed."""
    model = make_model(name)
    set_coupling(model, FixedPoint())
    twin = twin_of(model)
    x = process_input(name)
    for module in (model, twin):
        parallel = DistributedDataParallel(module)
        torch.manual_seed(dist.get_rank())
        for _ in range(2):
            parallel(x).backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def check_tolerance(name: str) -> None:
    """Check that each process has separate keyframes."""
    model = make_model(name)
    twin = twin_of(model)
    set_tolerance(model, 1e-20 if dist.get_rank() else 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReconstructionWarning)  # so tight a bound stores everything
        for module in (model, twin):
            parallel = DistributedDataParallel(module)
            for _ in range(2):
                parallel(process_input(name)).backward()
    assert_same_gradients(model, twin)
    assert (len(model.sequence.keyframes) > 0) == (dist.get_rank() == 1)


def check_data_parallel_against_one_process(name: str) -> None:
    model = make_model(name)
    expected = single_process_gradients(model, name)
    parallel = DistributedDataParallel(model)  # Kept: without it, the processes do not communicate.
    parallel(process_input(name)).backward()
    assert_same_gradients(model, expected, 1 / NUM_PROCESSES)


def check_accumulation_without_communication(name: str) -> None:
    model = make_model(name)
    twin = twin_of(model)
    x = process_input(name)
    for module in (model, twin):
        parallel = DistributedDataParallel(module)
        for _ in range(2):
            with parallel.no_sync():
                parallel(x).backward()
            grads = [parameter.grad.clone() for parameter in module.parameters()]
            parallel(2 * x).backward()
        assert not torch.equal(grads[0], module.sequence[0].f[0].weight.grad)
    assert_same_gradients(model, twin)


def check_buckets_go_out_block_by_block(name: str) -> None:
    """Check that a bucket is sent as soon as its gradients are computed, before earlier functions are replayed."""
    model = make_model(name)
    owner, recomputed, sent = {}, [], []
    for index, block in enumerate(model.sequence):
        for function in (block.f, block.g):
            place = 2 * index + (function is block.g)
            owner.update(dict.fromkeys(function.parameters(), place))
            function.register_forward_pre_hook(lambda *_, place=place: recomputed.append(place))
    parallel = DistributedDataParallel(model, bucket_cap_mb=1e-4)  # 100 bytes, so that each bucket has a few tensors

    def record(state, bucket):
        sent.append(({owner[parameter] for parameter in bucket.parameters()}, recomputed[-1]))
        return allreduce_hook(state, bucket)

    parallel.register_comm_hook(None, record)
    for _ in range(2):  # the second step uses the buckets that DDP forms after the first
        loss = parallel(process_input(name))
        recomputed.clear()
        sent.clear()
        loss.backward()
        assert recomputed == list(reversed(range(2 * DEPTH)))
        assert {place for places, _ in sent for place in places} == set(range(2 * DEPTH))
    for places, last_recomputed in sent:
        assert last_recomputed <= min(places)
        assert last_recomputed >= min(places) - 1, "held back"
    assert sent[0][1] >= 2 * DEPTH - 2, "the last block's gradients leave before the block below it runs again"


# ---------------------------------------------------------------------------------------- fully sharded


def shard(model: WithHead, how: str, **options) -> None:
    if how == "functions":
        for block in model.sequence:
            fully_shard(block.f, **options)
            fully_shard(block.g, **options)
    elif how == "blocks":
        for block in model.sequence:
            fully_shard(block, **options)
    elif how == "sequence":
        fully_shard(model.sequence, **options)
    fully_shard(model)


def check_fully_sharded(name: str, how: str, options: dict[str, bool], policy: str = "reverse") -> None:
    model = make_model(name, policy=policy)
    expected = single_process_gradients(model, name)
    twin = twin_of(model)
    x = process_input(name)
    for module in (model, twin):
        shard(module, how, **options)
        for _ in range(2):
            module(x).backward()
    assert_same_gradients(model, twin)
    if name != "conv":  # batch norm sees different batches in a single process
        assert_same_gradients(model, expected, 2 / NUM_PROCESSES)


def check_step_in_backward(how: str, policy: str, options: dict[str, bool]) -> None:
    """Sharded parameters and their state equal the ordinary step's, bit for bit."""
    models = [make_model("mlp", policy=policy) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    outcomes = []
    for model, in_backward in zip(models, (False, True), strict=True):
        shard(model, how, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if in_backward:
            StepInBackward(optimizer)
        for _ in range(3):
            model(process_input("mlp")).backward()
            optimizer.step()
            optimizer.zero_grad()
        states = [{"value": parameter.detach(), **optimizer.state[parameter]} for parameter in model.parameters()]
        outcomes.append(tree_map_only(DTensor, DTensor.to_local, states))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)
    model(process_input("mlp")).backward()
    with pytest.raises(RuntimeError, match="was used and freed in the backward pass, by `StepInBackward`"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


class LocalBytes(ResizedBytes):
    """Count local tensors. The storage of a `DTensor` has the size of all shards, and no memory or address."""

    def _watch(self, storage: torch.UntypedStorage) -> None:
        with suppress(RuntimeError):
            storage.data_ptr()
            super()._watch(storage)


def check_memory_of_step_in_backward() -> None:
    """One unit's gradients are alive at a time, so a deeper model needs no more beyond parameters and state."""
    peaks = []
    for depth in (3, 6):
        model = WithHead(CASE["mlp"].sequence(depth))
        shard(model, "functions")
        optimizer = torch.optim.AdamW(model.parameters())
        StepInBackward(optimizer)
        x = process_input("mlp")
        model(x).backward()
        optimizer.step()
        kept = [*model.parameters(), *[value for values in optimizer.state.values() for value in values.values()], x]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in kept]
        with LocalBytes(local) as live:
            model(x).backward()
            optimizer.step()
        peaks.append(live.peak_bytes)
    assert peaks[0] == peaks[1]


def check_one_unit_unsharded_at_a_time(how: str) -> None:
    """Check that a replay has full parameters only for its own unit and the one that is being prefetched."""
    model = make_model("mlp")
    functions = [function for block in model.sequence for function in (block.f, block.g)]
    per_unit = 2 if how == "blocks" else 1
    shard(model, how)
    whole_during = {}

    def count(index):
        whole_during[index] = {i for i, f in enumerate(functions) if not isinstance(next(f.parameters()), DTensor)}

    loss = model(process_input("mlp"))
    for index, function in enumerate(functions):
        function[1].register_forward_pre_hook(lambda *_, index=index: count(index))
    loss.backward()
    assert sorted(whole_during) == list(range(2 * DEPTH))
    for index, places in whole_during.items():
        assert index in places
        assert {place // per_unit for place in places} <= {index // per_unit, index // per_unit - 1}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_sharded_blocks_called_one_by_one() -> None:
    """Check FSDP around blocks, which the engine calls as modules."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*[ReversibleBlock(mlp(3), mlp(3)).double() for _ in range(3)])
    expected = copy.deepcopy(blocks)
    squares(expected(torch.cat([process_input("mlp", rank) for rank in range(NUM_PROCESSES)]))).backward()
    for block in blocks:
        fully_shard(block)
    fully_shard(blocks)
    squares(blocks(process_input("mlp"))).backward()
    assert_same_gradients(blocks, expected, 1 / NUM_PROCESSES)


def check_functions_sharded_in_low_precision() -> None:
    """Check that streams stay in float32 and functions compute in bfloat16 in both runs."""
    torch.manual_seed(0)
    model = WithHead(CASE["mlp"].sequence(DEPTH).float())
    twin = twin_of(model)
    x = process_input("mlp").float()
    for module in (model, twin):
        shard(module, "functions", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        module(x).backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        difference = (whole(parameter.grad) - whole(expected.grad)).norm()
        assert difference <= 1e-2 * whole(expected.grad).norm()  # one unit in the last place is 2^-8


def check_first_version_is_named(how: str, *, use_orig_params: bool) -> None:
    """Check the first version of FSDP, which moves parameters out of their modules."""
    sequence = CASE["mlp"].sequence(2)
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    module: nn.Module = sequence
    if how == "function":
        sequence.blocks[0].f = FullyShardedDataParallel(sequence.blocks[0].f, **options)
    elif how == "block":
        sequence.blocks[0] = FullyShardedDataParallel(sequence.blocks[0], **options)
    else:
        module = FullyShardedDataParallel(sequence, **options)
    with pytest.raises((NotImplementedError, TypeError), match=r"FullyShardedDataParallel.*fully_shard"):
        module(process_input("mlp"))


DATA_PARALLEL = {
    "plain": (0, {}),
    "find unused": (0, {"find_unused_parameters": True}),
    "find unused, some unused": (2, {"find_unused_parameters": True}),
    "static graph": (0, {"static_graph": True}),
    "static graph, some unused": (2, {"static_graph": True}),
    "buckets as views": (0, {"gradient_as_bucket_view": True}),
}
SLOW_SHARDS = [["blocks", "mlp"], ["blocks", "attention"], ["sequence", "mlp"], ["sequence", "conv"], ["root", "conv"]]
ALL_CHECKS = {
    **{
        f"data parallel, {case}, {name}": partial(check_data_parallel, name, *arguments)
        for case, arguments in DATA_PARALLEL.items()
        for name in ("conv-dropout", "tied")
    },
    **{
        f"data parallel, {policy}, conv-dropout": partial(check_data_parallel, "conv-dropout", 0, {}, policy)
        for policy in REVERSING_POLICIES
    },
    **{
        f"data parallel against one process, {name}": partial(check_data_parallel_against_one_process, name)
        for name in ("mlp", "attention", "tied")
    },
    **{f"exact reversal, {name}": partial(check_exact_reversal, name) for name in ("conv-dropout", "attention")},
    "tolerance, mlp": partial(check_tolerance, "mlp"),
    "accumulation without communication, mlp": partial(check_accumulation_without_communication, "mlp"),
    "accumulation without communication, tied": partial(check_accumulation_without_communication, "tied"),
    "buckets go out block by block, mlp": partial(check_buckets_go_out_block_by_block, "mlp"),
    "buckets go out block by block, conv": partial(check_buckets_go_out_block_by_block, "conv"),
    **{
        f"fully sharded, {how}, {name}": partial(check_fully_sharded, name, how, {})
        for how in ("functions", "blocks", "sequence", "root")
        for name in ("mlp", "conv", "attention")
    },
    **{
        f"fully sharded, {how}, {policy}, mlp": partial(check_fully_sharded, "mlp", how, {}, policy)
        for how in ("functions", "blocks")
        for policy in REVERSING_POLICIES
        if policy != "reverse"
    },
    "fully sharded, kept whole after forward": partial(
        check_fully_sharded, "mlp", "functions", {"reshard_after_forward": False}
    ),
    **{
        f"step in the backward pass, {how}, {policy}, {'resharded' if reshards else 'kept whole'}": partial(
            check_step_in_backward, how, policy, {"reshard_after_forward": reshards}
        )
        for how, policy, reshards in (("functions", "reverse", True), ("blocks", "checkpoint", False))
    },
    "memory of the step in the backward pass": check_memory_of_step_in_backward,
    "one function unsharded at a time": partial(check_one_unit_unsharded_at_a_time, "functions"),
    "one block unsharded at a time": partial(check_one_unit_unsharded_at_a_time, "blocks"),
    "functions sharded in low precision": check_functions_sharded_in_low_precision,
    "sharded blocks called one by one": check_sharded_blocks_called_one_by_one,
    **{
        f"first version of FSDP, {how}, {use}": partial(check_first_version_is_named, how, use_orig_params=use)
        for how in ("function", "block", "sequence")
        for use in (False, True)
    },
}


SLOW_CHECKS = {
    name: check
    for name, check in ALL_CHECKS.items()
    if name in ("data parallel, find unused, tied", "data parallel, static graph, tied")
    or (name.startswith("fully sharded, ") and name.split(", ")[1:] in SLOW_SHARDS)
}
CHECKS = {name: check for name, check in ALL_CHECKS.items() if name not in SLOW_CHECKS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return the outcome of each check in each process."""
    return run_checks(__name__, tmp_path_factory.mktemp("processes"), NUM_PROCESSES)


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name, outcomes):
    assert_passed(outcomes, name)


@pytest.mark.slow
def test_other_checks_in_two_processes(tmp_path):
    assert_all_pass(__name__, tmp_path, NUM_PROCESSES, "SLOW_CHECKS")
