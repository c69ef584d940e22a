import copy

import pytest
import torch
from torch import nn

from revnet import Checkpoint, Offload, PolicySequential, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.models import NICE, Glow, RealNVP, ReversibleTransformer, UNet3d, create_model, list_models
from revnet.nn import HasGradientCheckpointing, HasPolicies

NETWORKS = {
    "NICE": lambda: NICE(image_shape=(1, 4, 4), hidden_dim=4),
    "Glow": lambda: Glow(image_shape=(3, 8, 8), num_scales=2, num_steps=2, hidden_dim=4),
    "RealNVP": lambda: RealNVP(image_shape=(3, 8, 8), hidden_dim=4),
    "UNet3d": lambda: UNet3d(widths=(8, 16)),
    "ReversibleTransformer": lambda: ReversibleTransformer(vocab_size=5, dim=8, depth=2, num_heads=2),
    "ReversibleSequential": lambda: sequence(2),
    "PolicySequential": lambda: PolicySequential(nn.Linear(2, 2)),
}


def sequence(num_blocks, policy="store"):
    return ReversibleSequential(
        *[ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(num_blocks)], policy=policy
    )


class Network(HasGradientCheckpointing):
    def __init__(self, num_blocks=5):
        super().__init__()
        self.stem = PolicySequential(nn.Linear(3, 4), nn.Tanh())
        self.blocks = sequence(num_blocks)
        self.neck = PolicySequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        return self.neck(self.blocks(self.stem(x)))


def units(model):
    """Return the units of a model with their policies."""
    modules = [module for module in model.modules() if isinstance(module, HasPolicies)]
    return [pair for module in modules for pair in zip(module.policy_units, module.policies, strict=True)]


def saving(unit):
    return Reverse() if unit.is_reversible else Checkpoint()


@pytest.mark.parametrize("name", [*NETWORKS, *list_models()])
def test_every_model_has_the_switches(name):
    with torch.device("meta" if name not in NETWORKS else "cpu"):
        model = NETWORKS[name]() if name in NETWORKS else create_model(name)
    model.set_grad_checkpointing()
    assert [policy for _, policy in units(model)] == [saving(unit) for unit, _ in units(model)] != []
    assert model.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert {policy for _, policy in units(model)} == {Store()}
    assert not model.grad_checkpointing


def test_names_of_both_libraries_do_the_same():
    model = Network()
    switches = [
        (lambda: model.set_grad_checkpointing(enable=True), True),
        (lambda: model.set_grad_checkpointing(enable=False), False),
        (model.gradient_checkpointing_enable, True),
        (model.gradient_checkpointing_disable, False),
        (model.activation_checkpointing_enable, True),
        (model.activation_checkpointing_disable, False),
        (lambda: setattr(model, "grad_checkpointing", True), True),
        (lambda: setattr(model, "gradient_checkpointing", False), False),
    ]
    for switch, is_on in switches:
        switch()
        assert {policy == Store() for _, policy in units(model)} == {not is_on}
        assert model.grad_checkpointing is model.gradient_checkpointing is is_on
        assert model.is_gradient_checkpointing is model.is_activation_checkpointing is is_on


def test_one_unit_that_saves_memory_is_enough_to_be_on():
    assert create_model("revnet38").is_gradient_checkpointing
    assert not create_model("resnet32").is_gradient_checkpointing
    assert sequence(2, ["store", "checkpoint"]).is_gradient_checkpointing


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize(
    ("args", "kwargs"), [(({"every_n_layers": 2, "use_reentrant": False},), {}), ((), {"every_n_layers": 2})]
)
def test_every_n_layers_counts_blocks_and_other_units_separately(enable, args, kwargs):
    model = Network(num_blocks=5)
    getattr(model, enable)(*args, **kwargs)
    assert model.blocks.policies == (Reverse(), Store(), Reverse(), Store(), Reverse())
    assert model.stem.policies == (Checkpoint(),)
    assert model.neck.policies == (Store(),)


def test_every_n_layers_counts_across_sequences():
    model = Network()
    model.more = sequence(3)
    model.gradient_checkpointing_enable({"every_n_layers": 3})
    assert model.blocks.policies == (Reverse(), Store(), Store(), Reverse(), Store())
    assert model.more.policies == (Store(), Reverse(), Store())


def test_offload_keeps_activations_on_the_host():
    model = Network()
    model.gradient_checkpointing_enable({"offload": True, "every_n_layers": 2})
    assert model.blocks.policies == (Offload(), Store(), Offload(), Store(), Offload())
    assert model.stem.policies == (Offload(),)
    model.gradient_checkpointing_enable(offload=True)
    assert {policy for _, policy in units(model)} == {Offload()}


@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}, {"offload": True}])
def test_gradients_equal_the_stored_twin(options):
    torch.manual_seed(0)
    model = Network().double()
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable(options)
    x = torch.randn(3, 3, dtype=torch.float64)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        # Rebuilding a stream rounds once for each half-block: at most 10 of them, 2^-53 each.
        error = (parameter.grad - expected.grad).abs().max()
        assert error <= 100 * 10 * 2**-53 * expected.grad.abs().max()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"depth": 2}, ValueError, "has the key 'depth', but the options are 'use_reentrant', 'every_n_layers', 'off"),
        ([2], TypeError, r"`gradient_checkpointing_kwargs` \(=\[2\]\) must be a dict of options"),
        ({"every_n_layers": 0}, ValueError, r"`every_n_layers` \(=0\) must be a positive integer"),
        ({"every_n_layers": True}, ValueError, "`every_n_layers`"),
        ({"offload": "cpu"}, TypeError, r"`offload` \(='cpu'\) must be True or False"),
        ({"use_reentrant": 1}, TypeError, r"`use_reentrant` \(=1\) must be True or False"),
    ],
)
def test_rejects_wrong_options(kwargs, error, message):
    model = Network()
    with pytest.raises(error, match=message):
        model.gradient_checkpointing_enable(kwargs)
    assert {policy for _, policy in units(model)} == {Store()}


def test_rejects_an_option_that_is_given_twice():
    with pytest.raises(ValueError, match=r"`every_n_layers` \(=3\) is also a key of `gradient_checkpointing_kwargs`"):
        Network().gradient_checkpointing_enable({"every_n_layers": 2}, every_n_layers=3)


def test_rejects_a_module_without_units():
    class Plain(HasGradientCheckpointing):
        pass

    with pytest.raises(ValueError, match="`Plain` has no unit with a policy"):
        Plain().set_grad_checkpointing()
    Plain().set_grad_checkpointing(False)
    assert not Plain().grad_checkpointing


def test_a_network_may_set_the_attribute_before_it_has_blocks():
    class Later(HasGradientCheckpointing):
        def __init__(self):
            super().__init__()
            self.grad_checkpointing = False
            self.blocks = sequence(2, "reverse")

    assert Later().grad_checkpointing
