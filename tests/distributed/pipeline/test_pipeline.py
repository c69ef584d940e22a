"""Pipelines of two and of four processes on the CPU: gradients, held bytes, refusals and a killed process.

All checks of a group run in the same processes, since starting them takes longer than running the checks. Each check is
a separate test.
"""

import copy
import inspect
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

from revnet import Checkpoint, FixedPoint, Offload, ReconstructionWarning, Reverse, ReversibleSequential, Store
from revnet.distributed import Pipeline, ReversibleStage, StageModule, cut_into_stages
from revnet.distributed.pipeline._link import Header, Link
from revnet.distributed.pipeline._microbatches import checksum_of, divide
from revnet.memory.step._live import LiveBytes
from revnet.models import ReversibleTransformer
from revnet.nn import DuplicateStreams, JoinStreams
from tests.copies import copied_processes
from tests.distributed.pipeline.reference import (
    Parts,
    conv_batch,
    conv_model,
    first_states,
    reference_step,
    seed_stage,
)
from tests.distributed.processes import assert_passed, join_group
from tests.helpers import CASE, CASES, squares

COUNTS = {2: [3, 2], 4: [3, 2, 1, 2]}
"""Number of blocks in each stage, by the number of processes: unequal on purpose."""
BOUND = 1e-13
"""Largest error of a gradient in float64, relative to its largest element."""


def counts() -> list[int]:
    return COUNTS[dist.get_world_size()]


def make_pipeline(model: Parts, num_microbatches: int, **options: Any) -> Pipeline:
    options = {"num_blocks": counts(), **options}
    pipeline = Pipeline(model.blocks, stem=model.stem, head=model.head, num_microbatches=num_microbatches, **options)
    seed_stage(dist.get_rank())
    return pipeline


def stage_of(twin: Parts) -> StageModule:
    """Return the part of the reference that this process compares."""
    stages = cut_into_stages(twin.blocks, len(counts()), num_blocks=counts(), stem=twin.stem, head=twin.head)
    return stages[dist.get_rank()]


def assert_same(stage: StageModule, expected: StageModule, bound: float) -> None:
    """Check all gradients and buffers of a stage."""
    pairs = zip(stage.named_parameters(), expected.named_parameters(), strict=True)
    for (name, parameter), (_, twin) in pairs:
        if bound == 0:
            assert torch.equal(parameter.grad, twin.grad), name
        else:
            difference = (parameter.grad - twin.grad).abs().max()
            assert difference <= bound * twin.grad.abs().max(), f"{name}: {difference}"
    for (name, buffer), twin in zip(stage.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, twin, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------ gradients


def check_gradients(num_microbatches: int, dtype: torch.dtype = torch.float64, bound: float = BOUND, **options) -> None:
    model = conv_model(sum(counts()), **options).to(dtype)
    x, target = conv_batch(2 * num_microbatches, dtype)
    twin, expected = reference_step(model, counts(), x, target, F.cross_entropy, num_microbatches)
    pipeline = make_pipeline(model, num_microbatches)
    loss = pipeline.step(x, target, F.cross_entropy)
    assert abs(float(loss) - expected) <= max(bound, torch.finfo(dtype).eps) * expected
    assert_same(pipeline.stage, stage_of(twin), bound)


def check_exact(num_microbatches: int, coupling: FixedPoint) -> None:
    check_gradients(num_microbatches, torch.float32, 0.0, coupling=coupling)


def check_training() -> None:
    """Check the parameters after three steps with momentum and clipping, on batches of different sizes."""
    model = conv_model(sum(counts()), coupling=FixedPoint(40, is_wide=True)).double()
    twin = copy.deepcopy(model)
    twin.blocks.set_policies(Store())
    pipeline = make_pipeline(model, 4)
    optimizers = [torch.optim.SGD(module.parameters(), 0.05, momentum=0.9) for module in (pipeline, twin)]
    states = first_states(len(counts()))
    for size in (8, 16, 8):
        x, target = conv_batch(size, torch.float64)
        optimizers[0].zero_grad()
        pipeline.step(x, target, F.cross_entropy)
        norm = pipeline.clip_grad_norm_(0.1)
        optimizers[0].step()
        optimizers[1].zero_grad()
        reference_step(twin, counts(), x, target, F.cross_entropy, 4, states=states, is_copied=False)
        twin_norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizers[1].step()
        assert abs(norm - twin_norm) <= 1e-12 * twin_norm
    for parameter, expected in zip(pipeline.stage.parameters(), stage_of(twin).parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-10, atol=1e-12)


def check_policies(policies: list[Any]) -> None:
    """Check that blocks with other policies hold what they need themselves."""
    check_gradients(4, policy=policies[: sum(counts())])


def check_case(name: str) -> None:
    """Check a kind of block without stem and head, in evaluation mode, so that nothing is drawn at random."""
    case = CASE[name]
    torch.manual_seed(0)
    model = Parts(case.sequence(5), None, None).eval()
    x = torch.cat([case.input(requires_grad=False) for _ in range(4)])
    size = len(x) // 4
    args = tuple(value.detach() for value in case.args())
    kwargs = case.kwargs()
    twin, expected = reference_step(
        model, counts(), x, [None] * len(x), lambda y, _: squares(y), 4, lambda _: (args, kwargs)
    )
    pipeline = make_pipeline(model, 4)
    loss = pipeline.step(
        x, None, lambda y, _: squares(y), args=tuple(torch.cat([value] * 4) for value in args), shared=kwargs
    )
    assert size == case.shape[0]
    assert abs(float(loss) - expected) <= 1e-12 * abs(expected)
    assert_same(pipeline.stage, stage_of(twin), 1e-11)


def check_language_model() -> None:
    """Check a transformer with a mask for each microbatch, and a table of positions that all microbatches share."""
    torch.manual_seed(0)
    transformer = ReversibleTransformer(
        vocab_size=11, dim=4, depth=5, num_heads=2, dropout=0.1, is_causal=False
    ).double()

    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.dropout = transformer.embedding, transformer.dropout

        def forward(self, tokens):
            return self.dropout(self.embedding(tokens)).repeat(1, 1, 2)

    model = Parts(transformer.blocks, Embed(), nn.Sequential(transformer.norm, transformer.head))
    tokens, mask = torch.randint(11, (8, 6)), torch.rand(8, 6) > 0.3
    mask[:, 0] = True
    rotary = transformer.rotary(torch.zeros(2, 6, 8, dtype=torch.float64))

    def loss(logits, target):
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    def arguments(number):
        return (), {"mask": mask[2 * number : 2 * number + 2], "rotary": rotary}

    twin, expected = reference_step(model, counts(), tokens, tokens, loss, 4, arguments)
    pipeline = make_pipeline(model, 4)
    value = pipeline.step(tokens, tokens, loss, kwargs={"mask": mask}, shared={"rotary": rotary})
    assert abs(float(value) - expected) <= BOUND * expected
    assert_same(pipeline.stage, stage_of(twin), BOUND)


def check_autocast() -> None:
    """Check that functions compute in low precision, and that the backward pass is as outside of autocast."""
    model = conv_model(sum(counts()), coupling=FixedPoint())
    x, target = conv_batch(8, torch.float32)

    def loss(y, target):
        with torch.autocast("cpu", enabled=False):
            return F.cross_entropy(y.float(), target)

    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        pipeline = make_pipeline(model, 4)
        value = pipeline.step(x, target, loss)
    parts, expected = reference_step(twin, counts(), x, target, loss, 4, autocast=torch.bfloat16)
    assert abs(float(value) - expected) <= 1e-6 * expected
    assert_same(pipeline.stage, stage_of(parts), 0.0)


def check_evaluation() -> None:
    """Check that the output without gradients equals the one of one process, to the last bit."""
    model = conv_model(sum(counts()), coupling=FixedPoint(is_wide=True)).eval()
    x, _ = conv_batch(8, torch.float32)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in x.split(2)])
    pipeline = make_pipeline(model, 4)
    output = pipeline(x)
    if pipeline.stage.is_last:
        assert torch.equal(output, expected)
        assert not output.requires_grad
    else:
        assert output is None


def check_state_dict() -> None:
    """Check that the stages load their parts of the whole model, and that their parts make up the whole model."""
    model, other = conv_model(sum(counts())), conv_model(sum(counts()))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    pipeline = make_pipeline(model, 4)
    whole = other.state_dict()
    pipeline.stage.load_state_dict(whole)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, pipeline.stage.state_dict())
    merged = {key: value for part in parts for key, value in part.items()}
    assert sum(map(len, parts)) == len(merged)
    assert set(merged) == set(whole)
    for name, value in whole.items():
        # The parameters of this process were drawn by itself; the others differ.
        if name in parts[dist.get_rank()]:
            assert torch.equal(merged[name], value), name


def check_group() -> None:
    """Check stages in a group whose ranks are reversed, so that a rank is not a place."""
    order = list(reversed(range(dist.get_world_size())))
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:
        group = dist.new_group(order, sort_ranks=False)
    else:  # PyTorch 2.11 sorts the ranks of every group.
        order.reverse()
        group = dist.new_group(order)
    model = conv_model(sum(counts())).double()
    x, target = conv_batch(8, torch.float64)
    twin, expected = reference_step(model, counts(), x, target, F.cross_entropy, 4)
    pipeline = Pipeline(
        model.blocks, stem=model.stem, head=model.head, num_microbatches=4, num_blocks=counts(), group=group
    )
    assert pipeline.stage.index == order[dist.get_rank()]
    seed_stage(pipeline.stage.index)
    loss = pipeline.step(x, target, F.cross_entropy)
    assert abs(float(loss) - expected) <= BOUND * expected
    stages = cut_into_stages(twin.blocks, len(counts()), num_blocks=counts(), stem=twin.stem, head=twin.head)
    assert_same(pipeline.stage, stages[pipeline.stage.index], BOUND)


# ------------------------------------------------------------------------------------------------ PyTorch's schedules


def check_schedule(schedule: type, num_microbatches: int) -> None:
    model = conv_model(sum(counts())).double()
    x, target = conv_batch(2 * num_microbatches, torch.float64)
    twin, expected = reference_step(model, counts(), x, target, F.cross_entropy, num_microbatches)
    stage = ReversibleStage(stage_of(model))
    runner = schedule(stage, num_microbatches, loss_fn=F.cross_entropy)
    seed_stage(dist.get_rank())
    losses: list[torch.Tensor] = []
    inputs = (x,) if stage.is_first else ()
    output = runner.step(*inputs, **({"target": target, "losses": losses} if stage.is_last else {}))
    if stage.is_last:
        assert abs(float(sum(losses).detach()) / num_microbatches - expected) <= BOUND * expected
        assert output.shape == (2 * num_microbatches, 5)
    assert_same(stage.submod, stage_of(twin), BOUND)
    assert (stage.traffic.forward_bytes > 0) == (not stage.is_last)


def check_schedule_evaluates() -> None:
    model = conv_model(sum(counts())).double().eval()
    x, target = conv_batch(8, torch.float64)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in x.split(2)])
    stage = ReversibleStage(stage_of(model))
    output = Schedule1F1B(stage, 4, loss_fn=F.cross_entropy).eval(*((x,) if stage.is_first else ()), target=target)
    if stage.is_last:
        torch.testing.assert_close(output, expected, rtol=1e-14, atol=1e-14)


# ------------------------------------------------------------------------------------------------ bytes


def held_and_sent(num_microbatches: int, **options: Any) -> tuple[int, int, Pipeline]:
    """Return the largest number of bytes of tensors that are alive just before a pass, in a second step."""
    model = conv_model(sum(counts()), channels=16, **options).double()
    x, target = conv_batch(4 * num_microbatches, torch.float64)
    pipeline = make_pipeline(model, num_microbatches)
    pipeline.step(x, target, F.cross_entropy)
    pipeline.zero_grad(set_to_none=False)
    tensors = [*pipeline.parameters(), *pipeline.buffers(), *[p.grad for p in pipeline.parameters()], x, target]
    held = []
    live = LiveBytes(tensors)

    def watch(name: str) -> None:
        method = getattr(pipeline._runner, name)

        def watched(*args: Any) -> Any:
            held.append(live.live_bytes)
            return method(*args)

        setattr(pipeline._runner, name, watched)

    watch("forward")
    watch("backward")
    with live:
        pipeline.step(x, target, F.cross_entropy)
    return max(held), live.peak_bytes, pipeline


PAIR = 4 * 32 * 5 * 5 * 8
"""Bytes of a pair of streams of a microbatch."""


def check_held_bytes() -> None:
    """Check that a stage holds what it has just received, and nothing else, for any number of microbatches."""
    few, few_at_most, pipeline = held_and_sent(4)
    many, many_at_most, _ = held_and_sent(16)
    # The seed of the loss, a few numbers of the head.
    slack = PAIR // 10
    assert abs(many - few) <= slack
    assert abs(many_at_most - few_at_most) <= slack
    # The pair and its gradients, just received; in the last stage the input.
    assert few <= (1 if pipeline.stage.is_last else 2) * PAIR + slack, few / PAIR


def check_held_bytes_with_a_tolerance() -> None:
    """Check that a stage holds its own output and input for each microbatch that is under way, and none above it."""
    few, _, pipeline = held_and_sent(4, tolerance=1e-6)
    many, _, _ = held_and_sent(16, tolerance=1e-6)
    assert abs(many - few) <= PAIR // 10
    # Samples of the inputs of all functions, 512 elements each.
    samples = 2 * len(pipeline.stage.blocks) * 512 * 8
    num_under_way = pipeline.stage.num_stages - pipeline.stage.index
    assert few <= num_under_way * (2 * PAIR + samples) + 2 * PAIR


def check_sent_bytes() -> None:
    """Check the bytes: a pair forward, and a pair with its gradients backward, for each microbatch."""
    _, _, pipeline = held_and_sent(8)
    stage, traffic = pipeline.stage, pipeline.traffic
    assert traffic.forward_bytes == (0 if stage.is_last else 8 * PAIR)
    assert traffic.backward_bytes == (0 if stage.is_first else 2 * 8 * PAIR)
    assert traffic.num_tensors == 8 * (2 * (not stage.is_last) + 4 * (not stage.is_first))
    assert f"sent {traffic.forward_bytes:,} bytes forward and {traffic.backward_bytes:,} bytes backward" in str(traffic)


def check_stored_blocks_are_not_sent_back() -> None:
    _, _, pipeline = held_and_sent(8, policy=Store())
    assert pipeline.traffic.backward_bytes == (0 if pipeline.stage.is_first else 8 * PAIR)


# ------------------------------------------------------------------------------------------------ refusals


def check_refusals() -> None:
    model = conv_model(sum(counts())).double()
    num_stages = len(counts())
    with pytest.raises(
        ValueError, match=rf"`num_microbatches` \(={num_stages - 1}\) must be at least .* \({num_stages}\)"
    ):
        make_pipeline(model, num_stages - 1)
    pipeline = make_pipeline(model, 4)
    x, target = conv_batch(10, torch.float64)
    with pytest.raises(ValueError, match=r"`batch` \(of shape \(10, 2, 5, 5\)\) cannot be divided into .* \(=4\)"):
        pipeline.step(x, target, F.cross_entropy)
    x, target = conv_batch(8, torch.float64)
    for arguments, message in (
        ({"args": [1]}, "`args`"),
        ({"kwargs": [1]}, "`kwargs`"),
        ({"shared": 1}, "`shared`"),
        ({"kwargs": {"mask": torch.ones(3)}}, r"`kwargs` \(of shape \(3,\)\).*in `shared`"),
        ({"kwargs": {"mask": 1}, "shared": {"mask": 1}}, "`mask` is in `kwargs` and in `shared`"),
        ({"args": (torch.ones(8, requires_grad=True),)}, "requires a gradient"),
        ({"kwargs": {"mask": [1, 2]}}, r"`kwargs` contains .*pass a tensor, or a tuple or dict of tensors"),
        ({"target": [1] * 8}, "`target` contains") if pipeline.stage.is_last else ({"args": 1}, "`args`"),
    ):
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
            pipeline.step(**{"batch": x, "target": target, "loss": F.cross_entropy, **arguments})
    with pytest.raises(TypeError, match="`loss`"):
        pipeline.step(x, target, None)
    with torch.no_grad(), pytest.raises(RuntimeError, match="`step` needs gradients"):
        pipeline.step(x, target, F.cross_entropy)
    # Nothing was sent, so that the next step works.
    pipeline.step(x, target, F.cross_entropy)


def check_tied_stages() -> None:
    blocks = CASE["mlp"].sequence(sum(counts()))
    blocks[-1].g = blocks[0].f
    with pytest.raises(ValueError, match=r"stages 0 and \d share a tensor \(`blocks.blocks.0.f.0.weight` and"):
        Pipeline(blocks, num_microbatches=4, num_blocks=counts())
    torch.manual_seed(0)
    blocks = CASE["mlp"].sequence(sum(counts()))
    # Within a stage, weights may be tied.
    blocks[1].g = blocks[0].f
    model = Parts(blocks, None, None)
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin, _ = reference_step(model, counts(), x, [None] * 16, lambda y, _: squares(y), 4)
    pipeline = make_pipeline(model, 4)
    pipeline.step(x, None, lambda y, _: squares(y))
    assert_same(pipeline.stage, stage_of(twin), BOUND)


def check_different_numbers_of_microbatches() -> None:
    """Check that a disagreement is named by the stage after. The stage before waits, so it runs in a thread."""
    pipeline = make_pipeline(conv_model(sum(counts())), 4 if dist.get_rank() == 0 else 8)
    link = pipeline._link
    link.begin_step(torch.device("cpu"))
    if dist.get_rank() == 0:
        streams = [torch.zeros(2, 3)] * 2
        link.send_header(Header.of(streams, None, is_joined=True, needs_output=True, num_microbatches=4))
    elif dist.get_rank() == 1:
        with pytest.raises(ValueError, match="`num_microbatches` is 8 in stage 1, but 4 in stage 0"):
            link.receive_header(8)


def check_different_batches() -> None:
    """Check that a batch which a sampler has divided among the processes is an error, instead of wrong training."""
    pipeline = make_pipeline(conv_model(sum(counts())), 4)
    x, target = conv_batch(16, torch.float32)
    link = pipeline._link
    part = x.chunk(dist.get_world_size())[dist.get_rank()]
    link.begin_step(torch.device("cpu"), checksum_of(part))
    if pipeline.stage.is_first:
        inputs = divide(part, (), None, None, 4, pipeline.stage)
        pipeline._forward(0, [], inputs[0])
    else:
        with pytest.raises(ValueError, match="`batch` in stage 1 differs from the batch in stage 0"):
            link.receive_header(4)
    # The batch is needed only in the first stage, and the target only in the last.
    first, last = pipeline.stage.is_first, pipeline.stage.is_last
    pipeline.step(x if first else None, target if last else None, F.cross_entropy)


def check_channels_last() -> None:
    """Check that streams keep their layout on the way, so that kernels round as in one process."""
    model = conv_model(sum(counts()), coupling=FixedPoint()).to(memory_format=torch.channels_last)
    x, target = conv_batch(8, torch.float32)
    x = x.to(memory_format=torch.channels_last)
    twin, _ = reference_step(model, counts(), x, target, F.cross_entropy, 4)
    pipeline = make_pipeline(model, 4)
    pipeline.step(x, target, F.cross_entropy)
    assert_same(pipeline.stage, stage_of(twin), 0.0)
    if not pipeline.stage.is_first:
        assert pipeline._link.incoming.strides[0] != (75, 25, 5, 1)


def check_wrong_stage() -> None:
    stages = cut_into_stages(CASE["mlp"].sequence(sum(counts())), len(counts()), num_blocks=counts())
    with pytest.raises(ValueError, match=r"`stage` is stage \d of \d, but this process has rank"):
        ReversibleStage(stages[dist.get_rank() - 1])
    with pytest.raises(TypeError, match="`stage`"):
        ReversibleStage(stages[0].blocks)


# ------------------------------------------------------------------------------------------------ the groups

CHECKS: dict[int, dict[str, Callable[[], None]]] = {
    2: {
        "gradients, 4 microbatches": partial(check_gradients, 4),
        "gradients with a tolerance": partial(check_gradients, 4, tolerance=1e-6),
        "exact, wide": partial(check_exact, 4, FixedPoint(is_wide=True)),
        "training": check_training,
        "policies, stored": partial(check_policies, [Store()] * 5),
        "policies, last block stored": partial(check_policies, [Reverse(), Reverse(), Store(), Reverse(), Store()]),
        "policies, first block checkpointed": partial(
            check_policies, [Checkpoint(), Reverse(), Reverse(), Offload(), Reverse()]
        ),
        **{
            f"case, {case.name}": partial(check_case, case.name)
            for case in CASES
            if case.name not in ("nested-arguments", "tied", "tied-batch-norm")
        },
        "language model": check_language_model,
        "autocast": check_autocast,
        "evaluation": check_evaluation,
        "state dict": check_state_dict,
        "PyTorch's 1F1B": partial(check_schedule, Schedule1F1B, 4),
        "PyTorch's GPipe": partial(check_schedule, ScheduleGPipe, 4),
        "PyTorch's 1F1B evaluates": check_schedule_evaluates,
        "held bytes with a tolerance": check_held_bytes_with_a_tolerance,
        "bytes sent of stored blocks": check_stored_blocks_are_not_sent_back,
        "refusals": check_refusals,
        "tied stages": check_tied_stages,
        "different numbers of microbatches": check_different_numbers_of_microbatches,
        "different batches": check_different_batches,
        "channels last": check_channels_last,
        "wrong stage": check_wrong_stage,
    },
    4: {
        "gradients, 4 microbatches": partial(check_gradients, 4),
        "gradients, 8 microbatches": partial(check_gradients, 8),
        "gradients with a tolerance": partial(check_gradients, 8, tolerance=1e-6),
        "exact": partial(check_exact, 4, FixedPoint()),
        "held bytes": check_held_bytes,
        "bytes sent": check_sent_bytes,
        "group": check_group,
        "PyTorch's 1F1B": partial(check_schedule, Schedule1F1B, 8),
    },
}


def run_checks(rank: int, num_processes: int, folder: Path) -> None:
    warnings.simplefilter("error", ReconstructionWarning)
    join_group(rank, num_processes, folder)
    outcomes = {}
    for name, check in CHECKS[num_processes].items():
        try:
            check()
            dist.barrier()
            outcomes[name] = "passed"
        except Exception:
            outcomes[name] = traceback.format_exc()
            torch.save(outcomes, folder / f"{rank}.pt")
            # The processes no longer agree on what comes next.
            os._exit(1)
    if num_processes == 4:
        outcomes["killed"] = message_after_a_kill()
    torch.save(outcomes, folder / f"{rank}.pt")
    # Closing the group properly would wait for the killed process.
    os._exit(0)


def message_after_a_kill() -> str:
    """Return the error of a step in which the process of rank 2 is killed."""
    pipeline = make_pipeline(conv_model(sum(counts())).double(), 8)
    x, target = conv_batch(16, torch.float64)
    if dist.get_rank() == 2:
        forward, calls = pipeline._runner.forward, []

        def die(*args: Any) -> Any:
            calls.append(args[0])
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(*args)

        pipeline._runner.forward = die
    try:
        pipeline.step(x, target, F.cross_entropy)
    except RuntimeError as error:
        return str(error)
    return "no error"


def run_group(num_processes: int, folder: Path) -> list[dict[str, str]]:
    """Return the outcome of each check in each process."""
    processes = [
        copied_processes.Process(target=run_checks, args=(rank, num_processes, folder)) for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    assert not alive, "processes were left over"
    files = [folder / f"{rank}.pt" for rank in range(num_processes)]
    return [torch.load(file) if file.exists() else {} for file in files]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_group(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_group(4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", CHECKS[2])
def test_two_processes(name, two):
    assert_passed(two, name)


@pytest.mark.parametrize("name", CHECKS[4])
def test_four_processes(name, four):
    # The killed process could not save its outcomes.
    assert_passed(four, name, killed=(2,))


def test_killed_process_gives_one_clear_error_in_each_of_the_others(four):
    assert four[2] == {}
    for rank in (0, 1, 3):
        message = four[rank]["killed"]
        assert message.startswith(f"stage {rank} (rank {rank}) failed while "), message
        assert "a process has ended, or does not answer within the `timeout`" in message
        assert "\n" not in message


# ------------------------------------------------------------------------------------------------ one process


def test_one_process_accumulates_gradients():
    model = conv_model(3).double()
    x, target = conv_batch(8, torch.float64)
    twin, expected = reference_step(model, [3], x, target, F.cross_entropy, 4)
    pipeline = Pipeline(model.blocks, stem=model.stem, head=model.head, num_microbatches=4)
    seed_stage(0)
    loss = pipeline.step(x, target, F.cross_entropy)
    assert abs(float(loss) - expected) <= BOUND * expected
    (stage,) = cut_into_stages(twin.blocks, 1, stem=twin.stem, head=twin.head)
    assert_same(pipeline.stage, stage, BOUND)
    assert str(pipeline.traffic) == "sent 0 bytes forward and 0 bytes backward in 0 tensors"


def test_batch_may_be_a_pair_of_streams():
    sequence = CASE["mlp"].sequence(3)
    pair = torch.randn(8, 3).double(), torch.randn(8, 3).double()
    twin = copy.deepcopy(sequence)
    for part in zip(*[stream.split(2) for stream in pair], strict=True):
        (squares(torch.cat(twin(part), -1)) / 4).backward()
    pipeline = Pipeline(sequence, num_microbatches=4)
    pipeline.step(pair, None, lambda y, _: squares(torch.cat(y, -1)))
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-13, atol=1e-15)


def test_loss_must_be_a_scalar():
    pipeline = Pipeline(CASE["mlp"].sequence(2), num_microbatches=2)
    with pytest.raises(TypeError, match=r"`loss` returned .* must return a tensor with one element"):
        pipeline.step(torch.zeros(4, 6).double(), torch.zeros(4, 6), lambda y, _: y)
    # The failed step leaves nothing.
    assert pipeline._runner._passes == {}


def test_a_forgotten_process_group_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"each of them would train the whole model; call .*init_process_group"):
        Pipeline(CASE["mlp"].sequence(2), num_microbatches=2)


def test_output_may_be_nested():
    class Head(nn.Module):
        def forward(self, y):
            return {"mean": (y.mean(1), y), "count": 3}

    pipeline = Pipeline(CASE["mlp"].sequence(2), num_microbatches=2, head=Head())
    x = torch.randn(4, 6).double()
    output = pipeline(x)
    assert output["count"] == [3, 3]
    torch.testing.assert_close(output["mean"][0], output["mean"][1].mean(1))
    assert output["mean"][1].shape == (4, 6)
    loss = pipeline.step(x, {"a": (x, 1)}, lambda y, target: F.mse_loss(y["mean"][1], target["a"][0]))
    assert loss > 0


def test_unused_functions_of_the_last_block_get_no_gradient():
    """A gradient of zeros would let the optimizer change their weights, by weight decay and momentum."""
    sequence = CASE["mlp"].sequence(2)
    pipeline = Pipeline(sequence, num_microbatches=2, stem=DuplicateStreams(), head=JoinStreams("first"))
    x = torch.randn(4, 3).double()
    pipeline.step(x, None, lambda y, _: squares(y))
    unused = {name for name, parameter in sequence.named_parameters() if parameter.grad is None}
    assert unused == {name for name, _ in sequence.named_parameters() if name.startswith("blocks.1.g.")}


def test_microbatches_of_two_shapes_or_dtypes_are_not_sent():
    """The next stage would receive them as the first one, and fill the rest with what lay in memory."""
    link = Link(None, 0, 2)
    link.outgoing = Header.of([torch.ones(2, 5, 4)] * 2, None, is_joined=True, needs_output=True, num_microbatches=2)
    for streams, what in (
        (
            [torch.ones(2, 3, 4)] * 2,
            r"stream 1 of a microbatch is torch.float32 of shape \(2, 3, 4\), but torch.float32 of",
        ),
        ([torch.ones(2, 5, 4), torch.ones(2, 5, 4).double()], r"stream 2 of a microbatch is torch.float64 of shape"),
    ):
        with pytest.raises(ValueError, match=what + r".*\(2, 5, 4\) in the first .*`num_microbatches=1`"):
            link.send_ops(to_next=streams)


def test_first_stage_needs_a_batch():
    pipeline = Pipeline(CASE["mlp"].sequence(2), num_microbatches=2)
    with pytest.raises(TypeError, match="`batch` is None, but the first stage needs it"):
        pipeline.step(None, None, lambda y, _: squares(y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": nn.Linear(2, 2)}, "`blocks`"),
        ({"stem": 3}, "`stem`"),
        ({"head": "x"}, "`head`"),
        ({"num_stages": 0}, "`num_stages`"),
        ({"num_stages": 6}, r"`num_stages` \(=6\) must be at most the number of blocks \(5\)"),
        ({"num_blocks": [2, 2]}, r"`num_blocks` \(=\[2, 2\]\) must have one entry for each of 2 stages, and the sum 5"),
        ({"num_blocks": [5]}, "`num_blocks`"),
        ({"num_blocks": [5, 0]}, "`num_blocks`.*positive"),
        ({"num_blocks": 3}, "`num_blocks`"),
    ],
)
def test_rejects_a_wrong_cut(options, message):
    arguments = {"blocks": CASE["mlp"].sequence(5), "num_stages": 2, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        cut_into_stages(arguments.pop("blocks"), arguments.pop("num_stages"), **arguments)


def test_stages_share_the_modules_of_the_sequence():
    sequence = ReversibleSequential(*CASE["mlp"].sequence(5).blocks, policy=[Store()] * 3 + [Reverse()] * 2)
    stages = cut_into_stages(sequence, 3, num_blocks=[2, 2, 1])
    assert [block for stage in stages for block in stage.blocks] == list(sequence)
    assert [stage.first_block for stage in stages] == [0, 2, 4]
    assert stages[1].blocks.policies == (Store(), Reverse())
    # The middle stage begins with a stored block, so it keeps its input, which is then exact.
    assert [stage.num_above for stage in stages] == [0, 2, 0]
    assert "stage 1 of 3, blocks 2 to 3" in repr(stages[1])


def test_errors_name_blocks_by_their_places_in_the_whole():
    stages = cut_into_stages(CASE["mlp"].sequence(5), 2)
    stages[1].blocks[1].f = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match=r"blocks\.4\.f"):
        stages[1].blocks.record(torch.zeros(2, 6).double())


class Scaled(ReversibleSequential):
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


def with_own_part(kind):
    """Return a sequence that does more than run its blocks."""
    sequence = CASE["mlp"].sequence(3)
    if kind == "forward":
        return Scaled(*sequence.blocks)
    if kind == "forward of the instance":
        sequence.forward = lambda x: 2 * x
    elif kind == "forward hook":
        sequence.register_forward_hook(lambda module, args, y: 2 * y)
    elif kind == "forward pre-hook":
        sequence.register_forward_pre_hook(lambda module, args: None)
    elif kind == "backward hook":
        sequence.register_full_backward_hook(lambda module, grads, grads_of_output: None)
    elif kind == "backward pre-hook":
        sequence.register_full_backward_pre_hook(lambda module, grads: None)
    elif kind == "parameter":
        sequence.scale = nn.Parameter(torch.ones(3))
    elif kind == "buffer":
        sequence.register_buffer("scale", torch.ones(3))
    else:
        sequence.norm = nn.LayerNorm(6)
    return sequence


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("forward", r"`blocks` \(=Scaled\) has hooks or a `forward` of its own, which a stage would leave out"),
        *[
            (kind, "has hooks or a `forward` of its own, which .*; move it into `stem`, `head` or a block")
            for kind in ("forward of the instance", "forward hook", "forward pre-hook", "backward hook")
        ],
        ("backward pre-hook", "has hooks or a `forward` of its own"),
        ("parameter", r"has a parameter or buffer of its own \(`scale`\), which a stage would leave out"),
        ("buffer", r"has a parameter or buffer of its own \(`scale`\)"),
        ("module", r"has a parameter or buffer of its own \(`norm.weight`\)"),
    ],
)
def test_rejects_a_sequence_that_does_more_than_run_its_blocks(kind, message):
    for make in (
        lambda blocks: Pipeline(blocks, num_microbatches=1),
        lambda blocks: cut_into_stages(blocks, 2),
        StageModule,
    ):
        with pytest.raises(ValueError, match=message):
            make(with_own_part(kind))


def test_a_hook_on_the_blocks_of_a_stage_is_an_error():
    pipeline = Pipeline(CASE["mlp"].sequence(2), num_microbatches=2)
    handle = pipeline.stage.blocks.register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(4, 6).double()
    for run in (pipeline, lambda x: pipeline.step(x, None, lambda y, _: squares(y))):
        with pytest.raises(ValueError, match="has hooks or a `forward` of its own, which a stage would leave out"):
            run(x)
    handle.remove()
    pipeline.step(x, None, lambda y, _: squares(y))


def test_a_subclass_may_add_methods_and_other_names_of_its_blocks():
    class Named(ReversibleSequential):
        def __init__(self, *blocks):
            super().__init__(*blocks)
            self.first, self.layers, self.activation = self.blocks[0], self.blocks, nn.ReLU()

    Pipeline(Named(*CASE["mlp"].sequence(2).blocks), num_microbatches=1)


def test_an_infinite_bound_computes_only_the_norm():
    pipeline = Pipeline(CASE["mlp"].sequence(2), num_microbatches=2)
    pipeline.step(torch.randn(4, 6).double(), None, lambda y, _: squares(y))
    before = [parameter.grad.clone() for parameter in pipeline.parameters()]
    norm = pipeline.clip_grad_norm_(float("inf"))
    assert float(norm) == pytest.approx(float(nn.utils.get_total_norm(before)), rel=1e-12)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(pipeline.parameters(), before, strict=True))
    for wrong in (float("nan"), -float("inf"), -1, True, None, "inf"):
        with pytest.raises(ValueError, match=r"`max_norm` \(=.*\) must be 0 or more; infinity only returns the"):
            pipeline.clip_grad_norm_(wrong)
