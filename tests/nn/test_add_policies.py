"""Policies for the blocks of a model of any class."""

import copy
import inspect
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnet import Checkpoint, Offload, PolicySequential, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.errors import ReconstructionError
from revnet.nn import HasPolicies, add_policies, remove_policies


class Residual(nn.Module):
    """A block with batch norm, dropout, a parameter of its own, and keyword arguments."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y = self.conv2(self.drop(self.act(self.norm(self.conv1(x))))) * self.scale
        return x + (y if mask is None else y * mask)


class Network(nn.Module):
    """A stem, four blocks in a list, and a head."""

    def __init__(self, block: type[nn.Module] = Residual):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([block() for _ in range(4)])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask=torch.ones_like(x))
        return self.head(x.mean((2, 3)))


def step(model: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Return the output, the gradients and the buffers after a step of a copy of the model."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.square().sum().backward()
    return [y, *[p.grad for p in model.parameters() if p.grad is not None], *model.buffers()]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("policy", ["store", "checkpoint", "offload"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "autocast"])
def test_step_is_equal_bit_for_bit(policy, mode):
    model = Network().train(mode != "evaluation")
    expected = step(model, X, autocast=mode == "autocast")
    add_policies(model)
    set_policy(model, policy)
    assert_equal(step(model, X, autocast=mode == "autocast"), expected)


def test_model_keeps_its_structure():
    model = Network()
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    signature = inspect.signature(model.blocks[0].forward)
    assert list(add_policies(model)) == [f"blocks.{index}" for index in range(4)]
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert isinstance(model.blocks[0], Residual)
    assert type(model.blocks[0]).__name__ == "Residual"
    assert model.blocks[0].conv1.weight is dict(model.named_parameters())["blocks.0.conv1.weight"]
    assert inspect.signature(model.blocks[0].forward) == signature
    assert "policy" not in repr(model)
    set_policy(model, "checkpoint")
    assert repr(model.blocks[0]).startswith("Residual(\n  policy=Checkpoint()\n  (conv1)")


def test_policies_can_be_taken_away():
    model = Network()
    add_policies(model)
    set_policy(model, "checkpoint")
    remove_policies(model)
    assert type(model.blocks[0]) is Residual
    assert vars(model.blocks[0]).keys() == vars(Residual()).keys()
    assert not any(isinstance(module, HasPolicies) for module in model.modules())
    add_policies(model)
    assert model.blocks[0].policies == (Store(),)


def test_copies_and_pickles_keep_the_policies():
    model = Network()
    expected = step(model, X)
    add_policies(model, "blocks.*")
    model.blocks[1].set_policies("checkpoint")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [block.policies[0] for block in other.blocks] == [Store(), Checkpoint(), Store(), Store()]
        assert type(other.blocks[1]) is type(model.blocks[1])
        assert_equal(step(other, X), expected)


def test_weights_load_before_and_after():
    model, other = Network(), Network()
    add_policies(model)
    model.load_state_dict(other.state_dict())
    other.load_state_dict(model.state_dict())
    assert_equal(step(model, X), step(other, X))


def test_hooks_on_a_block_run_once():
    model = Network()
    add_policies(model)
    set_policy(model, "checkpoint")
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda *_: seen.append("before"))
    model.blocks[1].register_forward_hook(lambda *_: seen.append("after"))
    model.blocks[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    model(X).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_second_derivatives_are_equal():
    model = Network().double().eval()

    def second(model: nn.Module) -> list[Tensor]:
        x = X.double().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), model.stem.weight))

    expected = second(model)
    add_policies(model)
    set_policy(model, "checkpoint")
    assert_equal(second(model), expected)


class Pair(nn.Module):
    """A block that takes and returns a tuple, with an argument that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = pair
        first = first + torch.tanh(self.f(second)) * scale
        return first, {"second": torch.exp(first), "mask": first > 0}


def test_arguments_and_results_may_be_nested():
    blocks = nn.ModuleList([Pair() for _ in range(3)])
    pair = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)

    def grads() -> tuple[Tensor, ...]:
        first, rest = pair[0], {"second": pair[1]}
        for block in blocks:
            first, rest = block((first, rest["second"]), scale=0.5)
        return torch.autograd.grad((first * rest["mask"]).sum() + rest["second"].sum(), [*pair, *blocks.parameters()])

    expected = grads()
    add_policies(blocks)
    set_policy(blocks, "checkpoint")
    assert_equal(list(grads()), list(expected))


def test_new_names_replace_the_old_ones():
    model = Network()
    add_policies(model)
    set_policy(model, "checkpoint")
    add_policies(model, ["blocks.0", "blocks.3"])
    units = [name for name, module in model.named_modules() if isinstance(module, HasPolicies)]
    assert units == ["blocks.0", "blocks.3"]
    assert model.blocks[0].policies == (Store(),)
    add_policies(model, "blocks.*.conv?")
    assert len([module for module in model.modules() if isinstance(module, HasPolicies)]) == 8


@pytest.mark.parametrize("blocks", [Residual, "blocks.*", "b*.[0-3]", ["blocks.0", "blocks.[123]"]])
def test_names_blocks_by_pattern_and_by_class(blocks):
    assert list(add_policies(Network(), blocks)) == [f"blocks.{index}" for index in range(4)]


def test_names_blocks_by_module():
    model = Network()
    assert list(add_policies(model, model.blocks[2])) == ["blocks.2"]
    assert list(add_policies(model, list(model.blocks))) == [f"blocks.{index}" for index in range(4)]


class Stage(nn.Sequential):
    """A stage of blocks, which is repeated too."""


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(Stage(Residual(), Residual()), Stage(Residual())), ["0.0", "0.1", "1.0"]),
        (nn.Sequential(Stage(Residual(), Residual()), Stage(Residual(), Residual())), ["0.0", "0.1", "1.0", "1.1"]),
        (nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)]), ["0", "1"]),
        (
            nn.ModuleDict({"encoder": nn.ModuleList([Residual(), Residual()]), "decoder": nn.ModuleList([Pair()] * 1)}),
            ["encoder.0", "encoder.1"],
        ),
        (
            nn.ModuleDict(
                {"encoder": nn.ModuleList([Residual() for _ in "ab"]), "decoder": nn.ModuleList([Pair() for _ in "ab"])}
            ),
            ["encoder.0", "encoder.1", "decoder.0", "decoder.1"],
        ),
        (
            nn.Sequential(
                nn.ModuleList([Pair(), Pair()]), ReversibleSequential(ReversibleBlock(Residual(1), Residual(1)))
            ),
            ["0.0", "0.1"],
        ),
    ],
    ids=[
        "stages of two blocks and of one",
        "stages of blocks",
        "sequences",
        "one decoder",
        "encoder and decoder",
        "reversible",
    ],
)
def test_finds_the_blocks_that_a_model_repeats(model, names):
    assert list(add_policies(model)) == names


def scripted() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated.
        return torch.jit.trace(nn.ReLU(), torch.ones(1))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("block.*", "`blocks` holds 'block.*', which is not in `model` (=Network); names look like 'blocks.0'"),
        ("blocks", "`blocks` names `blocks` (ModuleList), which is a ModuleList, which is never called"),
        ([], "`blocks` (=[]) names no module"),
        (["blocks.0", "blocks.0.conv1"], "names `blocks.0` and `blocks.0.conv1`, of which the first contains"),
        (nn.Linear(2, 2), "`blocks` holds Linear, which is not in `model`"),
        ("done", "`blocks` names `done` (PolicySequential), which has policies of its own"),
        ("done.0", "`blocks` names `done.0` (Linear), which is inside `done`"),
        ("hooked", "`blocks` names `hooked` (ReLU), which has a `forward` of its own"),
        ("compiled", "`blocks` names `compiled` (ReLU), which is compiled as a whole"),
        ("script", "which is TorchScript"),
        ("policies", "which has an attribute `policies`"),
    ],
)
def test_rejects_blocks_that_cannot_have_a_policy(blocks, message):
    model = Network()
    model.done = PolicySequential(nn.Linear(2, 2))
    model.hooked, model.compiled, model.script = nn.ReLU(), nn.ReLU(), scripted()
    model.hooked.forward = model.hooked.forward
    model.compiled.compile(backend="eager")
    model.policies = nn.ReLU()
    model.policies.policies = 3
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        add_policies(model, blocks)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(block, HasPolicies) for block in model.blocks)


def test_rejects_a_model_without_blocks():
    with pytest.raises(
        ValueError, match=r"`model` \(=Linear\) has no `ModuleList` or `Sequential` with several blocks"
    ):
        add_policies(nn.Linear(2, 2))


def test_rejects_wrong_types():
    for blocks in (3, int, [int], ["blocks.0", 3]):
        with pytest.raises(TypeError, match="`blocks`"):
            add_policies(Network(), blocks)


def test_rejects_a_class_with_a_metaclass():
    class Meta(type):
        """A metaclass."""

    class Special(Residual, metaclass=Meta):
        """A block that cannot be combined with another class."""

    model = nn.Sequential(Residual(), Residual(), Special())
    with pytest.raises(TypeError, match=r"`2` \(=Special\) cannot be given a policy, because its class cannot be"):
        add_policies(model, Residual)
    assert [type(block) for block in model] == [Residual, Residual, Special]


def test_rejects_reversing_a_block():
    model = Network()
    add_policies(model)
    with pytest.raises(TypeError, match="is for reversible blocks"):
        model.blocks[0].set_policies("reverse")


def test_rejects_a_block_that_writes_to_its_argument():
    class Scaled(Residual):
        def forward(self, x, **kwargs):
            return super().forward(x.mul_(0.5), **kwargs)

    model = Network(Scaled)
    model(X).sum().backward()
    add_policies(model)
    set_policy(model, "checkpoint")
    with pytest.raises(RuntimeError, match=r"`blocks\.0` modified an argument in place.*`Store\(\)`"):
        model(X)


def test_rejects_a_cache():
    class GrowingCache(list):
        """A cache, as of keys and values."""

    model = Network()
    add_policies(model)
    set_policy(model, "checkpoint")
    with pytest.raises(ValueError, match=r"`blocks\.0` is given a GrowingCache.*`use_cache=False`"):
        model.blocks[0](torch.randn(1, 6, 4, 4), mask=GrowingCache())


def test_names_the_block_that_does_something_else():
    class Counting(Residual):
        count = 0

        def forward(self, x, **kwargs):
            self.count += 1
            return super().forward(x.repeat(self.count, 1, 1, 1), **kwargs)

    block = nn.ModuleList([Counting(), Counting()])
    add_policies(block)
    set_policy(block, "checkpoint")
    y = block[1](torch.randn(1, 6, 4, 4))
    with pytest.raises(ReconstructionError, match="`1` did something else when it ran again"):
        y.sum().backward()


def test_refuses_to_take_away_a_policy_under_another_class():
    model = Network()
    add_policies(model)
    model.blocks[0].__class__ = type("Sharded", (type(model.blocks[0]),), {})
    with pytest.raises(ValueError, match=r"`blocks\.0` of `model` had its class replaced again"):
        remove_policies(model)


def test_exported_programs_are_plain():
    model = Network().eval()
    expected = model(X)
    add_policies(model)
    set_policy(model, Checkpoint())
    for strict in (False, True):
        program = torch.export.export(model, (X,), strict=strict)
        assert torch.equal(program.module()(X), expected)


def test_compiles_under_store_and_says_so_otherwise():
    model = Network().eval()
    expected = step(model, X)
    add_policies(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(X)
    y.square().sum().backward()
    assert_equal([y, *[parameter.grad for parameter in model.parameters()]], expected[: 1 + len([*model.parameters()])])
    set_policy(model, Offload())
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"a Residual whose activations .* give it the policy `Store\(\)`"):
        torch.compile(model, backend="eager")(X)


def test_gradients_are_reduced_by_data_parallel():
    model = Network()
    expected = step(model, X)
    add_policies(model)
    set_policy(model, "checkpoint")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(1)
        y = DistributedDataParallel(model)(X)
        y.square().sum().backward()
    finally:
        dist.destroy_process_group()
    assert_equal([y, *[parameter.grad for parameter in model.parameters()], *model.buffers()], expected)
