"""The chains that a sequence caches between steps: every change rebuilds them, and nothing else does."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from revnet import Additive, FixedPoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.coupling import Affine
from revnet.nn import (
    AbstractReversibleBlock,
    CouplingLayer,
    FlowStep,
    GroupedBlock,
    LeapfrogBlock,
    MomentumBlock,
    MultiStreamBlock,
)
from revnet.nn.blocks._abstract_block import READS
from tests.helpers import mlp

BLOCKS = {
    "block": lambda: ReversibleBlock(mlp(4), mlp(4), split_dim=-1),
    "layer": lambda: CouplingLayer(mlp(4), split_dim=-1),
    "leapfrog": lambda: LeapfrogBlock(mlp(4), split_dim=-1),
    "momentum": lambda: MomentumBlock(mlp(4), split_dim=-1),
    "streams": lambda: MultiStreamBlock(mlp(4), mlp(4), split_dim=-1),
    "groups": lambda: GroupedBlock(mlp(4), mlp(4), split_dim=-1),
    "flow": lambda: FlowStep(mlp(4), num_channels=8, coupling=Additive()),
}
all_blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())


class PlainSubclass(ReversibleBlock):
    """A subclass that does not override `half_blocks`."""

    def __init__(self):
        super().__init__(mlp(4), mlp(4), split_dim=-1)
        self.note = 0


class Swapping(ReversibleBlock):
    """A subclass whose half-blocks depend on something outside of the block."""

    swap = False

    def half_blocks(self, prefix=""):
        f, g = super().half_blocks(prefix)
        return [f._replace(function=self.g), g._replace(function=self.f)] if self.swap else [f, g]


class ComputedCoupling(ReversibleBlock):
    """A subclass that computes its coupling."""

    current = Additive()
    coupling = property(lambda self: self.current, lambda self, value: None)


def make_sequence(make=BLOCKS["block"], count=3, policy=None):
    return ReversibleSequential(*[make() for _ in range(count)], policy=policy or Reverse())


def step(sequence, x=None):
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) if x is None else x
    sequence.zero_grad()
    y = sequence(x)
    y.square().mean().backward()
    return y


def with_empty_cache(sequence):
    """Return a sequence of the same blocks with an empty cache."""
    return ReversibleSequential(*sequence.blocks, policy=sequence.policies, tolerance=sequence.tolerance)


def chains(sequence):
    return [chain for _, chain in sequence._schedule().segments]


def reuses_schedule(sequence):
    """Return whether the next step reuses the schedule without calling `half_blocks`."""
    known = sequence._chains.known
    return known.origin is not None and known.origin.is_same(sequence)


def check_next_steps(sequence):
    """Check that the next steps compute what a sequence with an empty cache computes."""
    for _ in range(2):
        expected = step(with_empty_cache(sequence))
        expected_grads = [parameter.grad for parameter in sequence.parameters()]
        assert torch.equal(step(sequence), expected)
        assert all(
            (a is None and b.grad is None) or torch.equal(a, b.grad)
            for a, b in zip(expected_grads, sequence.parameters(), strict=True)
        )


@pytest.mark.parametrize("make", [*BLOCKS.values(), PlainSubclass], ids=[*BLOCKS.keys(), "subclass"])
def test_unchanged_step_reuses_the_schedule(make):
    sequence = make_sequence(make)
    step(sequence)
    assert reuses_schedule(sequence)
    before, plans = chains(sequence), chains(sequence)[0].plans
    for change in (sequence.eval, sequence.train, lambda: sequence.requires_grad_(False), sequence.double):
        change()
        assert reuses_schedule(sequence)
    assert chains(sequence)[0] is before[0]
    assert chains(sequence)[0].plans is plans


@all_blocks
def test_half_blocks_reads_only_the_declared_attributes(make):
    """A block that reads more attributes must declare them with `reads`."""
    block = make()
    attributes, children, list_name = READS[type(block).half_blocks]
    read = set()

    class Recording(type(block)):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    block.__class__ = Recording
    block.half_blocks()
    names = {name for name in read if not name.startswith("_")} - {"half_blocks"}
    read.clear()
    attributes(block)
    compared = {*read, *children, *([list_name] if list_name else [])}
    assert names <= compared


def all_subclasses(kind):
    return [each for direct in kind.__subclasses__() for each in (direct, *all_subclasses(direct))]


def test_every_block_declares_its_reads():
    kinds = [kind for kind in all_subclasses(AbstractReversibleBlock) if kind.__module__.startswith("revnet.")]
    kinds = [kind for kind in kinds if not kind.__name__.startswith("Abstract")]
    assert len(kinds) == len(BLOCKS)
    assert all(kind.half_blocks in READS for kind in kinds)


@all_blocks
def test_replaced_function_is_used(make):
    sequence = make_sequence(make)
    step(sequence)
    block = sequence.blocks[1]
    if isinstance(block, (MultiStreamBlock, GroupedBlock)):
        block.functions[1] = mlp(4)
    else:
        block.f = mlp(4)
    assert not reuses_schedule(sequence)
    check_next_steps(sequence)
    assert reuses_schedule(sequence)


@pytest.mark.parametrize("change", ["move", "swap", "new list", "other kind"])
def test_replaced_function_of_a_multi_stream_block_is_used(change):
    sequence = make_sequence(lambda: MultiStreamBlock(*[mlp(4) for _ in range(2)], split_dim=-1))
    step(sequence)
    block = sequence.blocks[1]
    if change == "move":
        block.functions.insert(0, block.functions.pop(1))
    elif change == "swap":
        block.functions[0], block.functions[1] = block.functions[1], block.functions[0]
    elif change == "new list":
        block.functions = nn.ModuleList([mlp(4), mlp(4)])
    else:
        block.functions = nn.Sequential(mlp(4), mlp(4))
    assert not reuses_schedule(sequence)
    check_next_steps(sequence)


@pytest.mark.parametrize("change", ["append", "delete", "replace", "swap", "insert", "new list", "functions exchanged"])
def test_replaced_block_is_used(change):
    sequence = make_sequence()
    step(sequence)
    blocks = sequence.blocks
    if change == "append":
        blocks.append(BLOCKS["block"]())
    elif change == "delete":
        del blocks[1]
    elif change == "replace":
        blocks[1] = BLOCKS["momentum"]()
    elif change == "swap":
        blocks[0], blocks[2] = blocks[2], blocks[0]
    elif change == "insert":
        blocks.insert(1, BLOCKS["layer"]())
    elif change == "new list":
        sequence.blocks = nn.ModuleList(reversed(blocks))
    else:
        blocks[0].f, blocks[0].g = blocks[0].g, blocks[0].f
    assert not reuses_schedule(sequence)
    check_next_steps(sequence)


def test_block_with_the_same_functions_keeps_the_chains():
    sequence = make_sequence()
    step(sequence)
    (before,) = chains(sequence)
    old = sequence.blocks[1]
    sequence.blocks[1] = ReversibleBlock(old.f, old.g, split_dim=-1)
    assert chains(sequence) == [before]


def test_replaced_coupling_is_used():
    sequence = make_sequence()
    step(sequence)
    for coupling in (FixedPoint(), Additive()):
        for block in sequence.blocks:
            block.coupling = coupling
        assert not reuses_schedule(sequence)
        check_next_steps(sequence)
        assert chains(sequence)[0].is_exact == (coupling == FixedPoint())
    sequence.blocks[1].coupling = FixedPoint()
    with pytest.raises(ValueError, match="so give all functions of a block or sequence the same one"):
        step(sequence)


def test_equal_coupling_keeps_the_chains():
    sequence = make_sequence()
    step(sequence)
    (before,) = chains(sequence)
    sequence.blocks[1].coupling = Additive()
    assert chains(sequence) == [before]


def test_changed_split_dim_and_stream_are_used():
    sequence = make_sequence(BLOCKS["layer"])
    step(sequence)
    sequence.blocks[1].updates = 1
    assert not reuses_schedule(sequence)
    check_next_steps(sequence)
    for block in sequence.blocks:
        block.split_dim = 1
    x = torch.randn(2, 8, 4)
    assert torch.equal(sequence(x), with_empty_cache(sequence)(x))


def test_changed_policies_are_used():
    sequence = make_sequence()
    step(sequence)
    sequence.set_policies(sequence.policies)
    assert reuses_schedule(sequence)
    sequence.set_policies([Reverse(), Store(), Reverse()])
    assert not reuses_schedule(sequence)
    check_next_steps(sequence)
    assert len(chains(sequence)) == 3


def test_policies_that_a_subclass_overrides_are_used():
    class Annealed(ReversibleSequential):
        stores = False

        @property
        def policies(self):
            return (Store(),) * len(self.blocks) if self.stores else super().policies

    sequence = Annealed(BLOCKS["block"](), BLOCKS["block"]())
    step(sequence)
    assert not reuses_schedule(sequence)
    sequence.stores = True
    assert [policy for policy, _ in sequence._schedule().segments] == [Store()]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_added_and_removed_block_hooks_are_noticed(register):
    sequence = make_sequence()
    step(sequence)
    (before,) = chains(sequence)
    calls = []
    handle = getattr(sequence.blocks[1], register)(lambda *_: calls.append(1))
    x = torch.randn(2, 8, requires_grad=True)
    for count in (1, 2):
        step(sequence, x)
        assert len(calls) == count
        assert not reuses_schedule(sequence)
    handle.remove()
    step(sequence, x)
    assert len(calls) == 2
    assert reuses_schedule(sequence)
    assert chains(sequence)[0].blocks is before.blocks is None


def test_added_and_removed_global_hooks_are_noticed():
    sequence = make_sequence()
    step(sequence)
    seen = []
    for count in (1, 2):
        handle = register_module_forward_hook(lambda module, x, y: seen.append(module))
        try:
            assert not reuses_schedule(sequence)
            step(sequence)
            step(sequence)
        finally:
            handle.remove()
        assert seen.count(sequence.blocks[1]) == 2 * count
        step(sequence)
        assert seen.count(sequence.blocks[1]) == 2 * count
    assert reuses_schedule(sequence)


def test_forward_on_the_instance_is_noticed(monkeypatch):
    sequence = make_sequence()
    step(sequence)
    block = sequence.blocks[1]
    calls = []
    old = block.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return old(*args, **kwargs)

    block.forward = counting
    step(sequence)
    del block.forward
    step(sequence)
    assert len(calls) == 1
    assert reuses_schedule(sequence)

    def counting_in_class(self, *args, **kwargs):
        calls.append(2)
        return AbstractReversibleBlock.forward(self, *args, **kwargs)

    monkeypatch.setattr(ReversibleBlock, "forward", counting_in_class)
    step(sequence)
    assert calls == [1, 2, 2, 2]


def test_half_blocks_on_the_instance_are_noticed():
    sequence = make_sequence()
    step(sequence)
    block = sequence.blocks[1]
    block.half_blocks = lambda prefix="": ReversibleBlock.half_blocks(block, prefix)[:1]
    step(sequence)
    assert not reuses_schedule(sequence)
    assert len(chains(sequence)[0].half_blocks) == 5


def test_half_blocks_of_a_subclass_run_in_each_step(monkeypatch):
    sequence = make_sequence(lambda: Swapping(mlp(4), mlp(4), split_dim=-1))
    for swap in (False, True, False):
        monkeypatch.setattr(Swapping, "swap", swap)
        check_next_steps(sequence)
        assert not reuses_schedule(sequence)
        assert (chains(sequence)[0].half_blocks[0].function is sequence.blocks[0].g) == swap


def test_property_of_a_subclass_is_read(monkeypatch):
    sequence = make_sequence(lambda: ComputedCoupling(mlp(4), mlp(4), split_dim=-1))
    for coupling in (Additive(), Affine(), Additive()):
        monkeypatch.setattr(ComputedCoupling, "current", coupling)
        assert {half_block.coupling for half_block in chains(sequence)[0].half_blocks} == {coupling}


def test_child_hidden_by_a_property_is_not_used():
    other = mlp(4)

    class Hiding(CouplingLayer):
        f = property(lambda self: other)

    sequence = make_sequence(lambda: Hiding(mlp(4), split_dim=-1))
    step(sequence)
    assert not reuses_schedule(sequence)
    assert chains(sequence)[0].half_blocks[0].function is other


@pytest.mark.parametrize("name", ["f", "coupling"])
def test_missing_attribute_is_named_in_the_error(name):
    sequence = make_sequence()
    step(sequence)
    delattr(sequence.blocks[1], name)
    with pytest.raises(AttributeError, match=f"'ReversibleBlock' object has no attribute '{name}'"):
        step(sequence)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda blocks: blocks.append(nn.Linear(8, 8)), TypeError, r"`blocks\[3\]` is now a Linear"),
        (
            lambda blocks: blocks.append(ReversibleBlock(nn.Tanh(), nn.Tanh(), split_dim=1)),
            ValueError,
            r"`blocks\[3\]` has split_dim=1, but `blocks\[0\]` has split_dim=-1",
        ),
        (
            lambda blocks: setattr(blocks[1], "split_dim", 1),
            ValueError,
            r"`blocks\[1\]` has split_dim=1, but `blocks\[0\]` has split_dim=-1",
        ),
        (
            lambda blocks: blocks.append(MultiStreamBlock(*[nn.Tanh() for _ in range(3)], split_dim=-1)),
            ValueError,
            r"`blocks\[3\]` has 3 streams, but `blocks\[0\]` has 2",
        ),
        (
            lambda blocks: blocks[1].functions.append(nn.Tanh()),
            ValueError,
            r"`blocks\.1\.functions` has 3 entries, but its block has 2 streams",
        ),
        (
            lambda blocks: blocks[1].functions.pop(0),
            ValueError,
            r"`blocks\.1\.functions` has 1 entry, but its block has 2 streams",
        ),
    ],
)
@pytest.mark.parametrize("has_hook", [False, True])
def test_wrong_block_raises_in_every_step(change, error, message, has_hook):
    sequence = make_sequence(BLOCKS["streams"])
    if has_hook:  # Then every step builds the schedule again.
        sequence.blocks[0].register_forward_hook(lambda *_: None)
    step(sequence)
    change(sequence.blocks)
    for _ in range(2):
        with pytest.raises(error, match=message):
            step(sequence)
    with pytest.raises(error, match=message):
        sequence.inverse(torch.randn(2, 8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sequence: pickle.loads(pickle.dumps(sequence))])
def test_copy_starts_without_a_cache(copied):
    sequence = make_sequence()
    step(sequence)
    other = copied(sequence)
    assert other._chains is not sequence._chains
    assert other._chains.known is None
    check_next_steps(other)
    assert not {id(half_block.function) for half_block in chains(other)[0].half_blocks} & set(
        map(id, sequence.modules())
    )


def test_shallow_copy_with_other_blocks_runs_them():
    """`nn.DataParallel` makes such copies: they share the cache, but not the blocks."""
    sequence = make_sequence()
    step(sequence)
    other = copy.copy(sequence)
    other._modules = {"blocks": nn.ModuleList([BLOCKS["block"]() for _ in range(3)])}
    for module in (other, sequence, other):
        check_next_steps(module)


def test_cache_keeps_only_the_functions_alive():
    sequence = make_sequence(PlainSubclass)
    block = sequence.blocks[0]
    block.extra, block.note = nn.Linear(3, 3), torch.zeros(3)
    step(sequence)
    assert reuses_schedule(sequence)
    references = [weakref.ref(value) for value in (block, block.extra, block.note, sequence.blocks)]
    sequence.blocks = nn.ModuleList(list(sequence.blocks)[1:])
    del block
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    functions = [
        weakref.ref(half_block.function) for half_block in sequence._chains.known.schedule.segments[0][1].half_blocks
    ]
    step(sequence)
    gc.collect()
    assert [function() is None for function in functions] == [True] * 2 + [False] * 4


def test_forward_has_a_signature_and_a_docstring():
    for kind in (ReversibleSequential, ReversibleBlock):
        assert list(inspect.signature(kind.forward).parameters) == ["self", "x", "args", "kwargs"]
        assert "do not modify the output" in inspect.getdoc(kind.forward)


@all_blocks
def test_single_block_keeps_its_chain(make):
    block, x = make(), torch.randn(2, 8)
    for _ in range(3):
        block(x).sum().backward()
    ((_, chain),) = block._schedule().segments
    assert chain.num_runs == 3
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))
        ((_, other_chain),) = other._schedule().segments
        assert other_chain is not chain
        assert other_chain.half_blocks[0].function is not chain.half_blocks[0].function


def test_single_block_uses_a_replaced_function():
    block, x = BLOCKS["block"](), torch.randn(2, 8)
    block(x).sum().backward()
    block.f = mlp(4)
    block(x).sum().backward()
    assert all(parameter.grad is not None for parameter in block.f.parameters())
    block.coupling = FixedPoint()
    assert block._schedule().segments[0][1].is_exact
