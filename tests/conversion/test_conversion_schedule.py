"""Schedules, and the arguments of `convert`."""

import pytest
import torch
from torch import nn

import revnet
from revnet import ReversibleBlock
from revnet.conversion import BDIA, Adapter, Consistent, ConversionSchedule, Dr2Net, Rewire, set_method
from revnet.nn import add_policies
from tests.conversion.hosts import Block, Host


@pytest.mark.parametrize(
    ("start", "end", "middle"),
    [
        (Dr2Net(), Dr2Net(0.5, 0.5), Dr2Net(0.75, 0.25)),
        (Consistent(0), Consistent(0.5), Consistent(0.25)),
        (BDIA(0.25), BDIA(0.5), BDIA(0.375)),
        (Adapter(a=0.1, b=1), Adapter(a=0.3, b=1), Adapter(a=0.2, b=1)),
        (Rewire(), Rewire(), Rewire()),
    ],
    ids=str,
)
def test_schedule_is_linear(start, end, middle):
    schedule = ConversionSchedule(start, end, num_updates=10)
    assert schedule.method_at(0) == start
    assert schedule.method_at(5) == middle
    assert schedule.method_at(10) == schedule.method_at(99) == end


def test_schedule_rejects_wrong_arguments():
    with pytest.raises(TypeError, match=r"`end` \(=Rewire.* must have the class of `start`"):
        ConversionSchedule(Dr2Net(), Rewire(), 10)
    with pytest.raises(TypeError, match=r"`start` \(=1\) must be a method of conversion"):
        ConversionSchedule(1, Rewire(), 10)
    with pytest.raises(ValueError, match="num_updates"):
        ConversionSchedule(Rewire(), Rewire(), 0)
    with pytest.raises(ValueError, match=r"`update` \(=-1\)"):
        ConversionSchedule(Rewire(), Rewire(), 1).method_at(-1)


@pytest.mark.parametrize(
    ("start", "end", "match"),
    [
        (
            Dr2Net(1, 0),
            Dr2Net(0.5, 0.5, 14),
            r"only in coefficients, which a schedule moves, and not in `fraction_bits`",
        ),
        (Rewire(), Rewire(14), "and not in `fraction_bits`"),
        (Consistent(0), Consistent(0.5, is_wide=True), "and not in `is_wide`"),
        (Adapter("one"), Adapter("two"), "and not in `name`"),
        (
            Adapter(a=-1.0),
            Adapter(a=1.0),
            "`a` of `start` .* must have one sign, since the stream of an `Adapter` is lost",
        ),
    ],
    ids=str,
)
def test_schedule_rejects_methods_between_which_it_cannot_move(start, end, match):
    with pytest.raises(ValueError, match=match) as caught:
        ConversionSchedule(start, end, 10)
    assert "\n" not in str(caught.value)


def test_training_under_a_schedule_equals_the_stored_twin():
    schedule = ConversionSchedule(Consistent(0), Consistent(0.5), num_updates=4)
    weights = []
    for policy in ("reverse", "store"):
        torch.manual_seed(0)
        host = Host(4, dropout=0.2)
        revnet.convert(host.blocks, schedule.start)
        revnet.set_policy(host, policy)
        optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2)
        for update in range(6):
            set_method(host, schedule.method_at(update))
            optimizer.zero_grad()
            host(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        weights.append(torch.cat([parameter.flatten() for parameter in host.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Consistent(float("nan")), r"`a` \(=nan\) must be a finite number"),
        (lambda: Dr2Net(alpha="1"), r"`alpha` \(='1'\) must be a finite number"),
        (lambda: Consistent(5), r"from 1/256 to below 4"),
        (lambda: Rewire(99), r"`fraction_bits`"),
        (lambda: BDIA(1), r"`size` \(=1\)"),
        (lambda: Adapter(a=0), r"`a` \(=0\) must have a magnitude from 1/256"),
    ],
)
def test_methods_reject_wrong_coefficients(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def host():
    return Host(3)


def with_policies():
    model = host()
    add_policies(model, blocks="blocks.*")
    return model


def with_own_forward():
    model = host()
    model.blocks[1].forward = lambda x: x
    return model


def converted():
    model = host()
    revnet.convert(model.blocks, Rewire())
    return model


def reversible():
    model = host()
    model.blocks[1] = ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8))
    return model


def with_policies_of_the_class():
    model = host()
    model.blocks = revnet.create_model("resnet32").stages[0]
    return model


def shared():
    model = host()
    model.blocks[2] = model.blocks[1]
    return model


def shared_state():
    model = host()
    for block in model.blocks:
        block.norm = nn.BatchNorm1d(16) if block is model.blocks[0] else model.blocks[0].norm
    return model


def checkpointing():
    model = host()
    model.grad_checkpointing = True
    return model


def nested():
    model = host()
    model.blocks = nn.ModuleList([nn.ModuleList([Block()])])
    return model


def scripted():
    model = host()
    model.blocks = nn.ModuleList([torch.jit.trace(nn.Linear(16, 16), torch.ones(2, 16))])
    return model


def compiled_by_script():
    model = host()
    model.blocks = nn.ModuleList([torch.jit.script(nn.Linear(16, 16))])
    return model


def compiled_blocks():
    model = host()
    model.blocks = nn.ModuleList([torch.compile(block) for block in model.blocks])
    return model


def overlapping():
    model = host()
    model.more = nn.ModuleList(list(model.blocks)[2:])
    return model


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (with_policies, {}, r"`blocks\.0` \(=Block\) has a policy, .* `revnet.nn.remove_policies`"),
        (
            with_policies_of_the_class,
            {},
            r"`blocks\.\d` \(=.*\) has a policy, .* set its policy with `revnet.set_policy`",
        ),
        (with_own_forward, {}, r"`blocks\.1` \(=Block\) has a `forward` that was set on the block itself"),
        (converted, {}, r"`blocks\.0` \(=Block\) is converted already"),
        (reversible, {}, r"`blocks\.1` \(=ReversibleBlock\) is reversible already"),
        (shared, {}, r"blocks `blocks\.1` and `blocks\.2` are one module"),
        (shared_state, {}, r"blocks `blocks\.0` and `blocks\.1` share the state of a BatchNorm1d"),
        (checkpointing, {}, r"`model` \(=Host\) has `grad_checkpointing` on"),
        (nested, {}, r"`blocks\.0` \(=ModuleList\) has no `forward`"),
        (scripted, {}, r"`blocks\.0` \(=.*\) is scripted"),
        (compiled_by_script, {}, r"`blocks\.0` \(=.*\) is scripted"),
        (compiled_blocks, {}, r"`blocks\.0` \(=OptimizedModule\) is the result of `torch\.compile`"),
        (host, {"blocks": ["blocks", "blocks"]}, r"`blocks` names `blocks\.0` twice; leave one of the lists out"),
        (overlapping, {"blocks": ["blocks", "more"]}, r"one block twice, as `blocks\.2` and as `more\.0`"),
        (
            host,
            {"blocks": "layers"},
            r"`blocks` names 'layers', which does not exist in `model`.*has blocks",
        ),
        (host, {"blocks": "head"}, r"`blocks` names 'head', which is a Linear"),
        (host, {"blocks": None}, r"`model` \(=.*Host.*\) must be a list of blocks"),
        (host, {"blocks": []}, r"`blocks` \(=\[\]\) must be the name of a list"),
        (host, {"method": 0.25}, r"`method` \(=0\.25\) must be a method of conversion"),
        (host, {"method": Adapter()}, r"`blocks\.0` \(=Block\) has no child `adapter`"),
        (host, {"branches": [["norm1", "attn"], ["mlp"]]}, r"`branches` names 'attn', which `blocks\.0` .* has norm1"),
        (host, {"branches": "norm1"}, r"`branches` \(='norm1'\) must be two or three lists of names"),
        (host, {"back": True, "blocks": None}, r"`model` \(=Host\) has no converted blocks"),
        (host, {"back": True}, r"`method` and `blocks` must be left out"),
        (host, {"branches": ["mlp", "mlp"], "method": Adapter()}, r"`branches` must be None for `Adapter`"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_convert_refuses_in_one_line_and_changes_nothing(make, options, match):
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises((TypeError, ValueError), match=match) as caught:
        revnet.convert(model, **{"blocks": "blocks", **options})
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes


def test_set_method_needs_converted_blocks():
    with pytest.raises(ValueError, match=r"`model` \(=Host\) has no converted blocks"):
        set_method(host(), Rewire())


def test_set_method_needs_the_adapters_that_it_uses():
    model = host()
    revnet.convert(model, Rewire(), blocks="blocks")
    with pytest.raises(ValueError, match=r"`blocks\.0` \(=.*\) has no child `adapter`"):
        set_method(model, Adapter())
    assert model.blocks[0].policies  # Still converted, by `Rewire()`.
    model(torch.ones(2, 4)).sum().backward()


def test_an_error_changes_no_row():
    class Fixed(Block):
        def __init_subclass__(cls):
            raise TypeError("no subclasses")

    model = host()
    model.blocks[2].__class__ = Fixed
    with pytest.raises(TypeError, match=r"`blocks\.2` \(=Fixed\) cannot be converted"):
        revnet.convert(model, Rewire(), blocks="blocks")
    assert [type(block) for block in model.blocks[:2]] == [Block, Block]

    model = nn.ModuleList([host(), host()])
    for part, branches in zip(model, (None, [["norm1", "mixer"], ["norm2", "mlp"]]), strict=True):
        revnet.convert(part, Rewire(), blocks="blocks", branches=branches)
        for block in part.blocks:
            block.adapter = nn.Identity()
    with pytest.raises(ValueError, match="`branches` must be None for `Adapter`"):
        set_method(model, Adapter())
    assert all("converted by Rewire" in repr(block) for part in model for block in part.blocks)


def test_method_of_a_list_of_blocks():
    blocks = list(host().blocks)
    revnet.convert(blocks, Rewire())
    set_method(blocks, Consistent(0.5))
    assert "converted by Consistent(a=0.5" in repr(blocks[1])
    with pytest.raises(ValueError, match=r"`model` \(=.*list.*\) has no converted blocks"):
        set_method([nn.Identity()], Rewire())


def test_first_block_stays_if_it_differs():
    class Stage(nn.Module):
        def __init__(self, width, stride):
            super().__init__()
            self.conv = nn.Conv2d(width, 8, 3, stride, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return y if y.shape != x.shape else x + y

    stages = nn.Sequential(Stage(4, 2), Stage(8, 1), Stage(8, 1))
    report = revnet.convert(nn.ModuleDict({"layer": stages}), Dr2Net(), blocks="layer")
    assert report.converted == ("layer.1", "layer.2")
    assert str(report).endswith(
        "left layer.0 as it is: its parameters or strides differ from the next block's, so it may change the shape"
    )
    stages(torch.randn(1, 4, 8, 8)).sum().backward()
    strided = nn.Sequential(Stage(8, 2), Stage(8, 1))
    assert revnet.convert(strided, Rewire()).left.keys() == {"0"}
