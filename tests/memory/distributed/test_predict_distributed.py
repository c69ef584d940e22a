"""Predictions for several devices: how the figures depend on them, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from revnet import Checkpoint, PredictionError, ReversibleBlock, ReversibleSequential, Store
from revnet.memory import predict, predict_distributed
from revnet.memory.distributed._equal_blocks import copy_to_meta, find_equal_blocks
from revnet.models import ReversibleViT

BATCH = 32


def block(width=6, *, dropout=0.0):
    def function():
        return nn.Sequential(nn.Linear(width, 10, bias=False), nn.Dropout(dropout), nn.Linear(10, width))

    return ReversibleBlock(function(), function(), split_dim=-1)


def network(num_blocks, *, num_more=0, policy=None):
    sequences = [
        ReversibleSequential(*[block(width) for _ in range(count)], **({} if policy is None else {"policy": policy}))
        for width, count in ((6, num_blocks), (8, num_more))
        if count
    ]
    between = [nn.Linear(12, 16)] if num_more else []
    layers = [nn.Linear(5, 12), sequences[0], *between, *sequences[1:], nn.Linear(16 if num_more else 12, 3)]
    with torch.device("meta"):
        return nn.Sequential(*layers).to("meta")


def prediction(model, num_devices=4, strategy="fsdp2", batch=BATCH, optimizer=torch.optim.AdamW, **options):
    inputs = torch.empty(batch, 5, device="meta")
    return predict_distributed(
        model, inputs, num_devices=num_devices, strategy=strategy, optimizer=optimizer, **options
    )


def predicted_directly(monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr("revnet.memory.distributed._equal_blocks.FEWEST", 10**9)
        patch.setattr("revnet.memory.distributed._predict_pipeline._FEW_AHEAD", 10**9)
        memory = prediction(*arguments, **options)
    assert not memory.is_extrapolated
    return memory


def assert_extrapolated(monkeypatch, *arguments, **options):
    """Check that the figures of shortened models are the figures of the whole one, to the byte."""
    memory, direct = prediction(*arguments, **options), predicted_directly(monkeypatch, *arguments, **options)
    assert memory.is_extrapolated
    assert memory.devices == direct.devices
    assert memory.communication == direct.communication
    assert memory.model_bytes == direct.model_bytes


@pytest.mark.slow
def test_figures_of_a_deep_model_follow_from_shallow_ones(monkeypatch):
    assert_extrapolated(monkeypatch, network(14))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, Store(), Checkpoint()], ids=["reverse", "store", "checkpoint"])
@pytest.mark.parametrize("options", [{}, {"shard_unit": "function"}, {"reshard_after_forward": False}], ids=str)
def test_figures_follow_from_two_shortened_sequences(monkeypatch, policy, options):
    assert_extrapolated(monkeypatch, network(15, num_more=20, policy=policy), **options)


@pytest.mark.slow
def test_figures_of_a_deep_model_on_many_devices_follow_from_shallow_ones(monkeypatch):
    assert_extrapolated(monkeypatch, network(60), num_devices=1024, batch=1024)


@pytest.mark.slow
def test_one_thousand_blocks_on_1024_devices_need_four_small_steps(monkeypatch):
    lengths = []

    def record(model, runs, counts):
        lengths.append(list(counts))
        return copy_to_meta(model, runs, counts)

    monkeypatch.setattr("revnet.memory.distributed._predict_process.copy_to_meta", record)
    memory = prediction(network(1000), num_devices=1024, batch=1024)
    assert memory.is_extrapolated
    assert lengths == [[3], [4], [5]]


def test_blocks_that_differ_run_in_full():
    blocks = [block(dropout=0.1 * (index % 2)) for index in range(14)]
    memory = prediction(nn.Sequential(nn.Linear(5, 12), ReversibleSequential(*blocks), nn.Linear(12, 3)), 2)
    assert not memory.is_extrapolated


@pytest.mark.parametrize(
    ("change", "num_runs"),
    [
        (lambda blocks: None, 1),
        (lambda blocks: setattr(blocks[3].f[1], "p", 0.4), 1),
        (lambda blocks: setattr(blocks[3].f[1], "p", 0.0), 0),
        (lambda blocks: blocks[3].f[0].weight.requires_grad_(False), 0),
        (lambda blocks: setattr(blocks[3].f[0], "weight", blocks[4].f[0].weight), 0),
        (lambda blocks: blocks[3].f.register_forward_hook(lambda *_: None), 0),
        (lambda blocks: setattr(blocks[3], "f", nn.Identity()), 0),
        (lambda blocks: setattr(blocks[3].g[0], "count", 1), 0),
        (lambda blocks: blocks[3].eval(), 0),
    ],
    ids=["equal", "other rate", "no dropout", "frozen", "tied", "hook", "other function", "other attribute", "mode"],
)
def test_equal_blocks_are_found(change, num_runs):
    blocks = [block(dropout=0.1) for _ in range(14)]
    change(blocks)
    assert len(find_equal_blocks(ReversibleSequential(*blocks))) == num_runs


def test_policies_divide_runs_of_equal_blocks():
    sequence = ReversibleSequential(*[block() for _ in range(30)], policy=["store"] * 13 + ["reverse"] * 17)
    assert [(run.start, run.stop) for run in find_equal_blocks(sequence)] == [(0, 13), (13, 30)]
    sequence.tolerance = 1e-3
    assert find_equal_blocks(sequence) == []


def test_one_device_needs_the_predicted_memory_of_a_step():
    model, x = network(3), torch.empty(BATCH, 5, device="meta")
    (device,) = prediction(model, 1, "ddp").devices
    alone = predict(model, x, optimizer=torch.optim.AdamW)
    assert device.held_bytes == alone.held_bytes
    # The buckets of DDP are copies of the gradients.
    assert device.peak_bytes == alone.peak_bytes + device.communication_bytes
    assert device.communication_bytes == alone.gradient_bytes


def test_sharding_divides_the_model_and_keeps_activations():
    devices = [prediction(network(4), num_devices, batch=8 * num_devices).devices[0] for num_devices in (1, 4)]
    for part in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        whole, quarter = (getattr(device, part) for device in devices)
        assert 3 * quarter < whole
    assert len({device.held_bytes for device in devices}) == 1
    deep, deeper = (prediction(network(count)).devices[0].held_bytes for count in (4, 8))
    assert deep == deeper


def test_padding_of_small_matrices_is_reported():
    few, many = (prediction(network(2), count, batch=1024) for count in (1, 1024))
    assert few.padding_bytes == 0
    assert "Padding" not in str(few)
    whole = 1024 * many.devices[0].parameter_bytes
    assert many.padding_bytes == whole - many.model_bytes > many.model_bytes
    assert "Padding: FSDP2 cuts the first dimension of each parameter into 1,024 equal shards." in str(many)
    gathered = next(entry for entry in many.communication if entry.phase == "forward")
    assert gathered.num_bytes == whole
    last = prediction(network(2), 1024, batch=1024, rank=1023).devices[0]
    assert last.parameter_bytes == many.devices[0].parameter_bytes
    assert last.optimizer_bytes < many.devices[0].optimizer_bytes


def test_leaves_the_model_unchanged():
    model = nn.Sequential(nn.Linear(5, 12), ReversibleSequential(block(), block()), nn.Linear(12, 3))
    parameters, kinds = list(model.parameters()), [type(module) for module in model.modules()]
    for strategy in ("ddp", "fsdp2", "pipeline"):
        predict_distributed(model, torch.zeros(BATCH, 5), num_devices=2, strategy=strategy, optimizer=torch.optim.Adam)
    assert all(parameter is before for parameter, before in zip(model.parameters(), parameters, strict=True))
    assert [type(module) for module in model.modules()] == kinds
    assert all(not parameter._post_accumulate_grad_hooks and parameter.grad is None for parameter in parameters)
    assert not dist.is_initialized()
    model(torch.zeros(BATCH, 5)).sum().backward()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_tensors_that_are_not_registered_may_be_on_the_meta_device(strategy):
    class Shifted(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.shift = torch.ones(4)

        def forward(self, x):
            return super().forward(x + self.shift)

    with torch.device("meta"):
        model, x = nn.Sequential(Shifted(), Shifted()), torch.empty(8, 4)
    predict_distributed(model, x, num_devices=2, strategy=strategy)
    assert model[0].shift.is_meta


def test_loss_and_keyword_arguments_are_divided():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 2)

        def forward(self, x, *, mask):
            assert len(x) == len(mask) == BATCH // 2
            return self.linear(x) * mask

    x, mask = torch.zeros(BATCH, 5), torch.zeros(BATCH, 1)
    options = {"num_devices": 2, "strategy": "ddp", "kwargs": {"mask": mask}, "loss": lambda y: y.square().mean()}
    (device,) = predict_distributed(Masked(), x, **options).devices
    assert device.input_bytes == (x.nbytes + mask.nbytes) // 2


# Pipelines ------------------------------------------------------------------------------------------------------------


def pair_bytes(num_microbatches):
    return BATCH // num_microbatches * 12 * 4


@pytest.mark.parametrize("num_microbatches", [4, 16])
def test_stages_hold_two_pairs_of_streams(num_microbatches):
    memory = prediction(network(8), 4, "pipeline", num_microbatches=num_microbatches)
    held = [device.held_bytes + device.communication_bytes for device in memory.devices]
    # The last stage also holds what its head saves.
    assert all(2 <= num_bytes / pair_bytes(num_microbatches) < 3.2 for num_bytes in held)
    forward, backward = memory.communication
    assert forward.num_bytes == num_microbatches * pair_bytes(num_microbatches)
    assert backward.num_bytes == 2 * forward.num_bytes


def test_stages_have_all_parameters_once():
    model = network(7)
    memory = prediction(model, 3, "pipeline", num_microbatches=4)
    total = sum(device.parameter_bytes for device in memory.devices)
    assert total == memory.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.devices[0].input_bytes == BATCH * 5 * 4
    assert memory.devices[1].input_bytes == 0


@pytest.mark.slow
def test_figures_of_many_stages_follow_from_few(monkeypatch):
    assert_extrapolated(monkeypatch, network(6), 6, "pipeline", num_microbatches=8, optimizer=None)


def test_models_without_stem_and_head_and_models_of_the_library_run_as_pipelines():
    with torch.device("meta"):
        blocks = ReversibleSequential(block(), block())
        model = ReversibleViT(img_size=8, patch_size=4, dim=8, depth=2, num_heads=2, num_classes=3)
    for module, x in ((blocks, torch.empty(8, 12)), (model, torch.empty(8, 3, 8, 8))):
        memory = predict_distributed(module, x, num_devices=2, strategy="pipeline", num_microbatches=2)
        assert [device.name for device in memory.devices] == ["stage 0", "stage 1"]
        assert memory.model_bytes == sum(parameter.nbytes for parameter in module.parameters())


class WithSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(5, 12), ReversibleSequential(block(), block())

    def forward(self, x):
        x = self.stem(x)
        return self.blocks(x.clone()) + x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(5, 12), ReversibleSequential(block(), block())

    def forward(self, x):
        return self.blocks(self.stem(x)) @ self.stem.weight


def tied_blocks():
    blocks = [block(), block()]
    blocks[1].f = blocks[0].f
    return nn.Sequential(nn.Linear(5, 12), ReversibleSequential(*blocks), nn.Linear(12, 3))


def test_shared_functions_are_not_sharded_alone():
    memory = prediction(tied_blocks(), 2)
    assert [entry.count for entry in memory.communication] == [1, 1]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: network(2, num_more=2), "has 2 reversible sequences instead of one"),
        (lambda: nn.Linear(5, 3), "has 0 reversible sequences instead of one"),
        (WithSkip, "uses activations from before its blocks after them"),
        (Tied, "uses `stem.weight` in two of its parts"),
        (tied_blocks, "shares parameters between stages 0 and 1"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(make, reason):
    with pytest.raises(ValueError, match=f"`model` .*{reason}.*so it cannot run as a pipeline; use the strategy fsdp2"):
        prediction(make(), 2, "pipeline", num_microbatches=4)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_devices": 0}, ValueError, "`num_devices` (=0) must be a positive integer"),
        ({"num_devices": 1025}, ValueError, "`num_devices` (=1025) must be at most 1,024"),
        ({"num_devices": True}, ValueError, "`num_devices` (=True) must be"),
        ({"strategy": "fsdp"}, ValueError, "`strategy` (='fsdp') must be 'ddp' or 'fsdp2' or 'pipeline'"),
        ({"shard_unit": "layer"}, ValueError, "`shard_unit` (='layer') must be"),
        ({"reshard_after_forward": 1}, TypeError, "`reshard_after_forward` (=1) must be True or False"),
        ({"rank": 4}, ValueError, "`rank` (=4) must be at most 3"),
        ({"batch": 30}, ValueError, "`inputs` (=30 samples) must be divisible by `num_devices` (=4), so"),
        ({"num_microbatches": 4}, ValueError, "`num_microbatches` (=4) is for strategy='pipeline'"),
        ({"strategy": "pipeline", "num_microbatches": 3}, ValueError, "must be at least `num_devices` (=4)"),
        ({"strategy": "pipeline", "num_microbatches": 5}, ValueError, "must be divisible by `num_microbatches` (=5)"),
        (
            {"strategy": "pipeline", "num_microbatches": 4},
            ValueError,
            "has 2 blocks, fewer than 4 stages",
        ),
        ({"optimizer": "adam"}, TypeError, "`optimizer` (='adam') must be an optimizer"),
        ({"autocast": torch.int8}, TypeError, "`autocast` (=torch.int8) must be"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error) as raised:
        prediction(network(2), **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_optimizer_of_the_model_is_refused():
    model = network(2)
    with pytest.raises(TypeError, match="must make an optimizer from parameters"):
        prediction(model, optimizer=torch.optim.SGD(model.parameters()))


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="has no output that requires a gradient"):
        prediction(network(2).requires_grad_(False), optimizer=None)


def test_a_process_group_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"in a process group.*predict in a process of its own"):
            prediction(network(2))
    finally:
        dist.destroy_process_group()


class NeedsValues(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def before_blocks(layer):
    return nn.Sequential(layer, ReversibleSequential(block(), block()))


class Unused(nn.Linear):
    def __init__(self):
        super().__init__(5, 2)
        self.other = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (
            before_blocks(NeedsValues(5, 12)),
            "fsdp2",
            "the step of Sequential on 4 devices cannot be predicted, because",
        ),
        (before_blocks(nn.Linear(7, 12)), "fsdp2", r"failed, on inputs of shape \(8, 5\) per device: RuntimeError"),
        (nn.Linear(7, 2), "ddp", r"failed, on inputs of shape \(8, 5\) per device: RuntimeError"),
        (Unused(), "ddp", "`other` gets no gradient, for which DistributedDataParallel would wait"),
    ],
)
def test_failing_models_are_explained(model, strategy, message):
    with pytest.raises(PredictionError, match=message) as raised:
        prediction(model, strategy=strategy)
    assert "\n" not in str(raised.value)
    assert not dist.is_initialized()
