"""`torch.compile` of a whole model, in one graph: gradients equal the stored twin's, and the memory is still saved."""

import gc
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.nn.utils import prune
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from revnet import Checkpoint, FixedPoint, Offload, Reverse, ReversibleBlock, ReversibleSequential, Store, set_coupling
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine._chain import Chain, HalfBlock
from revnet.engine.compile import compiled
from revnet.engine.compile._program import PROGRAMS
from revnet.errors import ReconstructionError
from revnet.models import RevNet
from revnet.nn import CouplingLayer
from tests.helpers import CASE, CASES, DEPTH, REVERSING_POLICIES, ConvResidual, assert_close, gradients, stored_twin

# PyTorch raises this warning itself when it traces any custom `autograd.Function`.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# PyTorch cannot trace these, in the stored twin either.
UNTRACEABLE = {"recurrent"}
# The operators do not support these.
UNTRACEABLE |= {"three-streams", "three-scaled-streams", "four-affine-streams", "three-groups", "four-affine-groups"}
TRACEABLE = [case for case in CASES if case.name not in UNTRACEABLE]
all_traceable_cases = pytest.mark.parametrize("case", TRACEABLE, ids=lambda case: case.name)
# A graph takes about a second to compile, so that every other case is compiled only in the slow tests.
traceable_cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (index % 2)) for index, case in enumerate(TRACEABLE)],
    ids=lambda case: case.name,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_whole(module, backend="aot_eager", **options):
    return torch.compile(module, backend=backend, fullgraph=True, **options)


def copied(values):
    return tree_map(
        lambda v: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v, values
    )


def loss_of(y):
    return sum(part.abs().square().sum() for part in (y if isinstance(y, tuple) else (y,)))


def assert_steps_as_twin(sequence, case, *, compiled=None, num_steps=2, autocast=False, tolerance=1e-9):
    """Check whole training steps of the compiled sequence against its uncompiled stored twin."""
    twin = stored_twin(sequence)
    compiled = compile_whole(sequence) if compiled is None else compiled
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    twin_x, twin_args, twin_kwargs = copied((x, args, kwargs))
    results = []
    for module, start, more, named in ((compiled, x, args, kwargs), (twin, twin_x, twin_args, twin_kwargs)):
        torch.manual_seed(1)
        for _ in range(num_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(start, *more, **named)
            loss_of(y).backward()
        results.append((y, torch.get_rng_state()))
    (y, state), (twin_y, twin_state) = results
    assert_close(y, twin_y, tolerance=tolerance)
    assert torch.equal(state, twin_state)
    assert_close(x.grad, twin_x.grad, tolerance=tolerance)
    assert_close(gradients(sequence), gradients(twin), tolerance=tolerance)
    assert_close(tree_map(lambda a: a.grad, args), tree_map(lambda a: a.grad, twin_args), tolerance=tolerance)
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert_close(buffer, expected, tolerance=tolerance)


@traceable_cases
def test_one_graph_trains_like_the_twin(case):
    assert_steps_as_twin(case.sequence(2), case)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_more_than_two_streams_raise(fullgraph):
    case = CASE["three-streams"]
    compiled = torch.compile(case.sequence(3), backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match="3 streams cannot be compiled as a whole; compile the residual functions"):
        compiled(case.input())


@pytest.mark.parametrize(
    "policy",
    [
        REVERSING_POLICIES["mixed"],
        pytest.param(Checkpoint(), marks=pytest.mark.slow),
        pytest.param(Store(), marks=pytest.mark.slow),
    ],
    ids=["mixed", "checkpoint", "stored"],
)
@pytest.mark.parametrize("name", ["conv-dropout", pytest.param("attention-context-mask", marks=pytest.mark.slow)])
def test_policies_mix_in_one_graph(name, policy):
    assert_steps_as_twin(CASE[name].sequence(DEPTH, policy), CASE[name])


def test_offload_raises():
    sequence = CASE["mlp"].sequence(2, Offload())
    with pytest.raises(Exception, match=r"cannot be kept on the host under `torch\.compile`; use the policy `Reverse"):
        compile_whole(sequence)(CASE["mlp"].input())


def test_pair_as_input_and_output():
    case = CASE["conv"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    compiled = compile_whole(sequence)
    pair = [half.detach().clone().requires_grad_() for half in case.input().chunk(2, 1)]
    twin_pair = copied(pair)
    loss_of(compiled(tuple(pair))).backward()
    loss_of(twin(tuple(twin_pair))).backward()
    for half, expected in zip(pair, twin_pair, strict=True):
        assert_close(half.grad, expected.grad)
    assert_close(gradients(sequence), gradients(twin))


def test_autocast_around_the_graph():
    case = CASE["attention"]
    sequence = case.sequence(2)
    assert_steps_as_twin(sequence, case, autocast=True, tolerance=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor():
    case = CASE["conv-dropout"]
    sequence = case.sequence(2)
    assert_steps_as_twin(sequence, case, compiled=compile_whole(sequence, "inductor"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graph_breaks_elsewhere():
    case = CASE["conv"]
    sequence = case.sequence(2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.sequence = sequence

        def forward(self, x):
            x = x * 1
            torch._dynamo.graph_break()
            return self.sequence(x)

    assert_steps_as_twin(sequence, case, compiled=torch.compile(Model(), backend="aot_eager"))


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_residual_functions_within_a_compiled_model(in_place):
    case = CASE["conv"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    for block in sequence:
        if in_place:
            block.f.compile(backend="aot_eager")
            block.g.compile(backend="aot_eager")
        else:
            block.f = torch.compile(block.f, backend="aot_eager")
    x = case.input()
    twin_x = x.detach().clone().requires_grad_()
    compile_whole(sequence)(x).square().sum().backward()
    twin(twin_x).square().sum().backward()
    assert_close(x.grad, twin_x.grad)
    assert_close([p.grad for p in sequence.parameters()], [p.grad for p in twin.parameters()])


def test_gradients_that_share_a_tensor():
    """A sum passes one tensor to both of its sides as their gradient; nothing may add to it in place afterwards."""

    class Shift(nn.Module):
        def forward(self, x, context):
            return x + context

    sequence = ReversibleSequential(*[ReversibleBlock(Shift(), Shift()) for _ in range(2)])
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, requires_grad=True)
    context = torch.randn(4, 3, requires_grad=True)
    twin_x, twin_context = copied((x, context))
    compile_whole(sequence)(x, context).square().sum().backward()
    twin(twin_x, twin_context).square().sum().backward()
    assert_close((x.grad, context.grad), (twin_x.grad, twin_context.grad), tolerance=1e-5)


def test_single_block():
    case = CASE["conv"]
    block = case.make_block().double()
    twin = stored_twin(ReversibleSequential(block))
    x = case.input()
    twin_x = x.detach().clone().requires_grad_()
    compile_whole(block)(x).square().sum().backward()
    twin(twin_x).square().sum().backward()
    assert_close(x.grad, twin_x.grad)
    assert_close(list(gradients(block).values()), list(gradients(twin).values()))


def test_whole_model():
    sizes = {"num_blocks": (2, 1), "widths": (8, 8, 16)}
    model = RevNet(**sizes).double()
    twin = RevNet(**sizes, policy=Store()).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    compile_whole(model)(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert_close(gradients(model), gradients(twin), tolerance=1e-7)
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert_close(buffer, expected)


@pytest.mark.parametrize("input_requires_grad", [pytest.param(True, marks=pytest.mark.slow), False])
def test_frozen_parameters_and_input(input_requires_grad):
    case = CASE["conv"]
    sequence = case.sequence(3)
    sequence[0].requires_grad_(False)
    sequence[1].f.conv1.weight.requires_grad_(False)
    twin = stored_twin(sequence)
    x = case.input(requires_grad=input_requires_grad)
    twin_x = x.detach().clone().requires_grad_(input_requires_grad)
    compile_whole(sequence)(x).square().sum().backward()
    twin(twin_x).square().sum().backward()
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("depth", [1, 2])
def test_frozen_stack_before_a_trained_one(depth):
    """A frozen stack, followed by a trained one."""
    frozen = CASE["mlp"].sequence(depth).requires_grad_(False)
    model = nn.Sequential(frozen, CASE["mlp"].sequence(2))
    x = CASE["mlp"].input(requires_grad=False)
    twin = nn.Sequential(*[stored_twin(sequence) for sequence in model])
    for module in (compile_whole(model), twin):
        module(x).square().sum().backward()
    assert_close(gradients(model), gradients(twin))


def test_called_twice_accumulated_and_retained():
    case = CASE["conv-dropout"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    x = case.input(requires_grad=False)
    for module in (compile_whole(sequence), twin):
        torch.manual_seed(3)
        first, second = module(x), module(2 * x)
        first.square().sum().backward(retain_graph=True)
        (first * second).sum().backward()
    assert_close(gradients(sequence), gradients(twin))


def test_one_output_unused():
    case = CASE["mlp"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    x1, x2 = case.input(requires_grad=False).chunk(2, -1)
    for module in (compile_whole(sequence), twin):
        module((x1, x2))[0].square().sum().backward()
    # Compiled graphs give zeros for outputs without a gradient, as PyTorch's own do.
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert_close(parameter.grad, torch.zeros_like(parameter) if expected.grad is None else expected.grad)


def test_evaluation_and_training_have_different_graphs():
    case = CASE["conv-dropout"]
    sequence = case.sequence(2)
    compiled = compile_whole(sequence)
    for mode in (True, False, True):
        sequence.train(mode)
        sequence.zero_grad()
        assert_steps_as_twin(sequence, case, compiled=compiled, num_steps=1)


def test_changed_mode_of_one_module_makes_a_new_graph():
    case = CASE["conv"]
    sequence = case.sequence(2)
    compiled = compile_whole(sequence)
    assert_steps_as_twin(sequence, case, compiled=compiled, num_steps=1)
    sequence.zero_grad()
    sequence[1].g.norm1.eval()
    assert_steps_as_twin(sequence, case, compiled=compiled, num_steps=1)


def test_switched_to_evaluation_before_backward():
    case = CASE["conv-dropout"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    x = case.input(requires_grad=False)
    for module, plain in ((compile_whole(sequence), sequence), (twin, twin)):
        torch.manual_seed(3)
        loss = module(x).square().sum()
        plain.eval()
        loss.backward()
    assert_close(gradients(sequence), gradients(twin))


def test_without_gradients():
    case = CASE["conv"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    with torch.no_grad():
        x = case.input(requires_grad=False)
        assert_close(compile_whole(sequence)(x), twin(x))
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert_close(buffer, expected)


def test_dynamic_batch():
    case = CASE["conv"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    compiled = compile_whole(sequence, dynamic=True)
    for size in (2, 3, 5):
        x = torch.randn(size, *case.shape[1:], dtype=torch.float64)
        compiled(x).square().sum().backward()
        twin(x).square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


def test_weights_updated_between_steps():
    case = CASE["mlp"]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    x = case.input(requires_grad=False)
    for module, plain in ((compile_whole(sequence), sequence), (twin, twin)):
        optimizer = torch.optim.SGD(plain.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert_close(list(sequence.parameters()), list(twin.parameters()))


def test_wrong_residual_raises_while_compiling():
    sequence = ReversibleSequential(ReversibleBlock(nn.Linear(3, 2), nn.Linear(3, 3)))
    with pytest.raises(Exception, match=r"`blocks.0.f` returned shape \(4, 2\), but must return the shape"):
        compile_whole(sequence)(torch.randn(4, 6))


def test_lost_gradient_raises():
    outside = torch.ones(3, requires_grad=True)

    class Leaning(nn.Linear):
        def forward(self, x):
            return super().forward(x) * outside

    sequence = ReversibleSequential(ReversibleBlock(Leaning(3, 3), nn.Linear(3, 3)))
    loss = compile_whole(sequence)(torch.randn(4, 6)).sum()
    with pytest.raises(ReconstructionError, match=r"`blocks.0.f` uses a tensor of shape .* requires a gradient"):
        loss.backward()


def test_random_numbers_not_seen_while_tracing_raise():
    class Sometimes(nn.Linear):
        active = False

        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.active))

    sequence = ReversibleSequential(ReversibleBlock(Sometimes(3, 3), nn.Linear(3, 3)))
    compiled = compile_whole(sequence)
    compiled(torch.randn(4, 6)).sum().backward()
    sequence[0].f.active = True
    with pytest.raises(ReconstructionError, match=r"`blocks.0.f` drew random numbers, but did not when it was traced"):
        compiled(torch.randn(4, 6))


LOSSES = []


class Auxiliary(nn.Linear):
    """Passes an auxiliary loss to its caller, in one of many ways."""

    def __init__(self, way):
        super().__init__(3, 3)
        self.way = way
        self.losses = {"all": []}

    def forward(self, x, losses):
        loss = self.weight.square().sum()
        match self.way:
            case "list argument":
                losses[0].append(loss)
            case "dict argument":
                losses[1][len(losses[1])] = loss
            case "attribute":
                self.loss = loss
            case "list in an attribute":
                self.losses["all"].append(loss)
            case "global list":
                LOSSES.append(loss)
        return super().forward(x)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("list argument", "filled a list or dict among its arguments"),
        ("dict argument", "filled a list or dict among its arguments"),
        ("attribute", "changes `loss` of Auxiliary in every call"),
        ("list in an attribute", "changes a list in every call"),
        ("global list", "keeps a tensor that it computed"),
    ],
)
def test_auxiliary_loss_that_would_lose_its_gradient_raises(way, message, fullgraph):
    sequence = ReversibleSequential(ReversibleBlock(Auxiliary("none"), Auxiliary(way)))
    compiled = torch.compile(sequence, backend="aot_eager", fullgraph=fullgraph)
    LOSSES.clear()
    with pytest.raises(Exception, match=rf"`blocks\.0\.g` {message}, which a compiled .*`block\.f\.compile\(\)"):
        compiled(torch.randn(4, 6), ([], {}))


def test_auxiliary_loss_not_seen_while_tracing_raises():
    class Later(Auxiliary):
        way = property(
            lambda self: ways[0], lambda self, way: None
        )  # Not an attribute, which the compiler would guard.

    ways = ["none"]
    sequence = ReversibleSequential(ReversibleBlock(Auxiliary("none"), Later("none")))
    compiled = compile_whole(sequence)
    compiled(torch.randn(4, 6), ([], {}))
    ways[0] = "global list"
    LOSSES.clear()
    with pytest.raises(NotImplementedError, match=r"`blocks\.0\.g` keeps a tensor that it computed"):
        compiled(torch.randn(4, 6), ([], {}))


def test_function_that_counts_its_calls_raises():
    class Counting(nn.Linear):
        count = 0

        def forward(self, x):
            self.count += 1
            return super().forward(x) / self.count

    sequence = ReversibleSequential(ReversibleBlock(Counting(3, 3), nn.Linear(3, 3)))
    with pytest.raises(Exception, match=r"`blocks\.0\.f` changes `count` of Counting in every call"):
        compile_whole(sequence)(torch.randn(4, 6))


def test_function_that_writes_to_its_parameter_raises():
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3, max_norm=1)

        def forward(self, x):
            return x * self.embedding(torch.arange(4))

    sequence = ReversibleSequential(ReversibleBlock(Bounded(), nn.Linear(3, 3)))
    with pytest.raises(Exception, match=r"`blocks\.0\.f` writes to a parameter or an argument"):
        compile_whole(sequence)(torch.randn(4, 6))


class Cached(nn.Linear):
    """Computes a constant in its first call, and leaves a reference cycle in each call."""

    def __init__(self):
        super().__init__(3, 3)
        self.cache = {}

    def forward(self, x):
        if x.shape not in self.cache:
            self.cache[x.shape] = torch.linspace(0, 1, 3, dtype=x.dtype)
        y = super().forward(x) * self.cache[x.shape]

        def find(depth):
            return find(depth - 1) if depth else y.tanh()

        return find(3)


def branching():
    class Branching(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if x.sum() > 0 else 2 * y

    return Branching(3, 3)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make_function",
    [
        Cached,
        branching,
        lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
        lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    ],
    ids=["cached", "branching", "weight-norm-hook", "pruned", "weight-norm"],
)
def test_functions_with_harmless_attributes(make_function):
    sequence = ReversibleSequential(*[ReversibleBlock(make_function(), make_function()) for _ in range(2)]).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    compiled = compile_whole(sequence)
    for _ in range(2):
        sequence.zero_grad()
        compiled(x).square().sum().backward()
    reversed_gradients = {name: gradient.clone() for name, gradient in gradients(sequence).items()}
    sequence.zero_grad()
    sequence.set_policies(Store())
    sequence(x).square().sum().backward()
    assert_close(reversed_gradients, gradients(sequence))


class PartlyUsed(nn.Module):
    """Uses one of two layers and no argument."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, context):
        return self.used(x)


@pytest.mark.parametrize("output", [0, 1, slice(None)])
def test_unused_parameters_get_no_gradient(output):
    """Plain autograd returns none either: an optimizer skips the weight, whereas zeros would make it decay."""
    sequence = ReversibleSequential(*[ReversibleBlock(PartlyUsed(), PartlyUsed()) for _ in range(2)]).double()
    twin = stored_twin(sequence)
    x1, x2 = torch.randn(4, 6, dtype=torch.float64).chunk(2, 1)
    context = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for module, transform in ((sequence, compile_whole), (twin, lambda call: call)):
        loss_of(transform(lambda module=module: module((x1, x2), context)[output])()).backward()
    assert_close(gradients(sequence), gradients(twin))
    assert gradients(sequence)["blocks.0.f.unused.weight"] is None
    assert context.grad is None


class Scaled(nn.Linear):
    """A function with a required keyword argument."""

    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x, *, scale):
        return super().forward(x) * scale


def test_arguments_by_function():
    f, g, h = Scaled(), Scaled(), nn.Linear(3, 3)
    chain = Chain(
        [
            HalfBlock(f, target=0, source=1, name="f", role="f"),
            HalfBlock(g, target=1, source=0, name="g", role="g"),
            HalfBlock(h, target=0, source=1, name="h", role="h", takes_arguments=False),
        ]
    )
    x1, x2, f_scale, g_scale = (torch.randn(4, 3, requires_grad=True) for _ in range(4))

    @compile_whole
    def run(*streams):
        return compiled(chain.bind(own_kwargs={"f": {"scale": f_scale}, "g": {"scale": g_scale}}), streams)

    y1 = x1 + f(x2, scale=f_scale)
    y2 = x2 + g(y1, scale=g_scale)
    y1 = y1 + h(y2)
    leaves = [x1, x2, f_scale, g_scale, *f.parameters(), *g.parameters(), *h.parameters()]
    expected = torch.autograd.grad(loss_of((y1, y2)), leaves)
    actual = run(x1, x2)
    assert_close(actual, (y1, y2), tolerance=1e-6)
    assert_close(torch.autograd.grad(loss_of(actual), leaves), expected, tolerance=1e-4)


def test_changed_coupling_makes_a_new_graph():
    num_graphs = 0

    def count(graph, _):
        nonlocal num_graphs
        num_graphs += 1
        return graph

    sequence = CASE["mlp"].sequence(2).float()
    x = torch.randn(4, 6)
    compiled = compile_whole(sequence, backend=count)
    for expected, coupling in enumerate((Additive(), FixedPoint(8), FixedPoint(10), Additive()), start=1):
        set_coupling(sequence, coupling)
        for _ in range(2):
            assert torch.equal(compiled(x), stored_twin(sequence)(x))
        assert num_graphs == expected


def test_different_models_have_different_digests():
    """Compiled graphs are cached on disk, where only the digest distinguishes two programs of the same number."""
    digests = set()
    for function in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Dropout()), PartlyUsed().used.requires_grad_()):
        torch._dynamo.reset()
        compile_whole(ReversibleBlock(function, nn.Linear(3, 3)))(torch.randn(4, 6))
        digests.add(PROGRAMS[max(PROGRAMS)].digest())
    assert len(digests) == 2


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd():
    """Uncompiled, a backward pass would be compiled hook by hook, which takes minutes; compiled, it is one operator."""
    sequence = CASE["mlp"].sequence(2)
    twin = stored_twin(sequence)
    x = CASE["mlp"].input(requires_grad=False)
    loss_of(twin(x)).backward()
    loss = loss_of(sequence(x))
    with compiled_autograd._enable(torch.compile(backend="eager")), pytest.raises(Exception, match="compiled autograd"):
        loss.backward()
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        sequence.zero_grad()
        loss = loss_of(compile_whole(sequence)(x))
        with compiled_autograd._enable(torch.compile(backend=backend)):
            loss.backward()
        assert_close(gradients(sequence), gradients(twin))


def test_hooks_of_blocks_raise():
    sequence = CASE["mlp"].sequence(2)
    sequence[1].register_forward_hook(lambda *_: None)
    with pytest.raises(Exception, match=r"the block of `blocks\.1\.f` has hooks"):
        compile_whole(sequence)(CASE["mlp"].input())


def test_shared_buffer_raises():
    norm = nn.BatchNorm1d(3)
    sequence = ReversibleSequential(ReversibleBlock(nn.Sequential(norm), nn.Sequential(norm)))
    with pytest.raises(Exception, match="is a buffer of two modules in a compiled reversible sequence"):
        compile_whole(sequence)(torch.randn(4, 6))


def peak_bytes(module, x):
    """Return the maximum of the bytes that PyTorch's allocator had given out in one step."""
    for _ in range(2):
        module(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module(x).sum().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# PyTorch 2.11 warns when a profiler ends.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_memory_is_flat_in_depth():
    """For each block, a compiled graph adds the gradients that it returns, and no activation."""

    def peak(depth, policy):
        torch._dynamo.reset()
        sequence = ReversibleSequential(
            *[ReversibleBlock(ConvResidual(8), ConvResidual(8)) for _ in range(depth)], policy=policy
        )
        gradient_bytes = sum(4 * parameter.numel() for parameter in sequence.parameters())
        return peak_bytes(compile_whole(sequence), torch.randn(4, 16, 32, 32)) - gradient_bytes

    stream = 4 * 8 * 32 * 32 * 4
    deep = peak(4, Reverse())
    assert abs(deep - peak(2, Reverse())) < stream // 16
    assert deep < 18 * stream
    assert peak(4, Store()) - peak(2, Store()) > 2 * 7 * stream


def test_programs_are_deleted_with_their_functions():
    sequence = CASE["mlp"].sequence(2)
    compile_whole(sequence)(CASE["mlp"].input()).sum().backward()
    number = max(PROGRAMS)
    function = weakref.ref(sequence[0].f)
    del sequence
    torch._dynamo.reset()
    gc.collect()
    assert function() is None
    assert number not in PROGRAMS


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_exact_reversal_is_exact(autocast):
    sequence = CASE["conv-dropout"].sequence(3).float()
    set_coupling(sequence, FixedPoint())
    twin = stored_twin(sequence)
    x = torch.randn(2, 6, 5, 5)
    for module in (compile_whole(sequence), twin):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        loss_of(y).backward()
    for gradient, expected in zip(gradients(sequence).values(), gradients(twin).values(), strict=True):
        assert torch.equal(gradient, expected)


def test_stream_out_of_range_raises():
    sequence = ReversibleSequential(*[ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)])
    set_coupling(sequence, FixedPoint())
    with pytest.raises(ReconstructionError, match=r"a stream reached .* at `blocks.0.f`, beyond the 1,024 up to which"):
        compile_whole(sequence)(torch.full((2, 4), 1e4))


@pytest.mark.parametrize(
    "policy",
    [
        REVERSING_POLICIES["kept"],
        pytest.param(REVERSING_POLICIES["held"], marks=pytest.mark.slow),
        pytest.param(Reverse(hold="f"), marks=pytest.mark.slow),
        Reverse(keep=("f.linear", "g.linear.0")),
        pytest.param(Reverse(hold="f,g", keep="64MiB"), marks=pytest.mark.slow),
        pytest.param(Reverse(keep=torch.ops.aten.mm), marks=pytest.mark.slow),
    ],
    ids=["all", "mixed", "hold", "names", "bytes", "operator"],
)
def test_held_streams_and_kept_outputs_have_no_effect(policy):
    case = CASE["mlp"]
    assert_steps_as_twin(case.sequence(4, policy), case)


class CountedTanh(nn.Module):
    """A residual function of its own class, so that no other test has compiled its code."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def test_compiled_functions_run_compiled_inside_a_compiled_model():
    """The compiler first meets them in the probe, on fake tensors, and must not give up on their code there."""
    num_runs = 0

    def counting_backend(graph, inputs):
        def run(*args):
            nonlocal num_runs
            num_runs += 1
            return graph(*args)

        return run

    blocks = [ReversibleBlock(CountedTanh(), CountedTanh()) for _ in range(2)]
    sequence = ReversibleSequential(*blocks).double()
    twin = stored_twin(sequence)
    for block in sequence.blocks:
        block.compile(backend=counting_backend)
    x = torch.randn(4, 6, dtype=torch.float64)
    loss_of(compile_whole(sequence)(x)).backward()
    assert num_runs == 2 * 4  # Forward and replay of each function.
    loss_of(twin(x)).backward()
    assert_close(gradients(sequence), gradients(twin))


@dataclass(frozen=True)
class RandomScale(AbstractCoupling):
    """A coupling whose scale is drawn for each call, or that draws wherever it runs."""

    scale: float | None = 1.0
    draws_in: str = ""

    is_additive = False

    @property
    def draws(self):
        return self.scale is None

    def drawn(self, x, *, training):
        return replace(self, scale=2.0 if torch.rand(()) < 0.5 else 0.5)

    def prepare(self, x):
        return x

    def _drop(self, x, where):
        return nn.functional.dropout(x, 0.5, where in self.draws_in)

    def forward(self, x, residual, name="f"):
        return self.scale * x + self._drop(residual, "forward")

    def inverse(self, y, residual, name="f", *, in_place=False):
        return (y - residual) / self.scale

    def log_det(self, x, residual):
        return self._drop(torch.zeros(len(x)), "log_det")

    def limit(self, dtype):
        return None


@pytest.mark.parametrize("fullgraph", [True, False])
def test_coupling_that_is_drawn_for_each_call_raises(fullgraph):
    sequence = ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3), coupling=RandomScale(None)))
    compiled = torch.compile(sequence, backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"the coupling of `blocks\.0\.f` draws random numbers or depends on the mode"):
        compiled(torch.randn(4, 6))


@pytest.mark.parametrize("where", ["forward", "log_det"])
def test_coupling_that_draws_where_it_runs_raises(where):
    coupling = RandomScale(draws_in=where)
    sequence = ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3), coupling=coupling))
    with pytest.raises(Exception, match=r"the coupling of `blocks\.0\.f` draws random numbers, which its inverse"):
        compile_whole(sequence.forward_with_log_det)(torch.randn(4, 6))


def test_coupling_that_draws_but_did_not_while_tracing_raises(monkeypatch):
    sequence = ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3), coupling=RandomScale()))
    compiled = compile_whole(sequence)
    compiled(torch.randn(4, 6)).sum().backward()
    monkeypatch.setattr(RandomScale, "_drop", lambda self, x, where: nn.functional.dropout(x, 0.5))
    with pytest.raises(
        NotImplementedError, match=r"the coupling of `blocks\.0\.f` draws random numbers, which its inv"
    ):
        compiled(torch.randn(4, 6))


def test_coupling_with_a_parameter_raises():
    @dataclass(frozen=True, eq=False)
    class Learned(RandomScale):
        scale: torch.Tensor = field(default_factory=lambda: torch.ones((), requires_grad=True))

    sequence = ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3), coupling=Learned()))
    with pytest.raises(Exception, match=r"the coupling of `blocks\.0\.f` uses a tensor that requires a gradient"):
        compile_whole(sequence)(torch.randn(4, 6))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_raise(backend):
    sequence = CASE["mlp"].sequence(2)
    x = CASE["mlp"].input()
    (gradient,) = torch.autograd.grad(loss_of(compile_whole(sequence, backend)(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice|does not currently support double backward"):
        gradient.square().sum().backward()


class Gated(nn.Linear):
    """A function that depends on its input, its weight, or a tensor from outside, only while a gate is open."""

    def __init__(self, what, gate):
        super().__init__(3, 3, bias=False)
        self.what, self.gate = what, gate
        self.outside = [torch.ones(3, requires_grad=what == "outside")]
        self.requires_grad_(what != "outside")

    def forward(self, x):
        is_open = self.gate[0] if isinstance(self.gate, list) else self.gate
        tensors = {"source": x, "weight": self.weight, "outside": self.outside[0]}
        if not is_open:
            tensors[self.what] = tensors[self.what].detach()
        return nn.functional.linear(tensors["source"], tensors["weight"]) * tensors["outside"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("source", "depends on its input, but did not when it was traced"),
        ("weight", r"depends on a parameter or an argument of shape \(3, 3\), but did not when it was traced"),
        ("outside", r"uses a tensor of shape \(3,\) that requires a gradient but is neither its parameter nor"),
    ],
)
def test_dependence_not_seen_while_tracing_raises(what, message):
    """A backward pass would not notice: it ends above such a function, or computes no gradient of its input."""
    function = Gated(what, [False])
    sequence = ReversibleSequential(
        CouplingLayer(function, updates=0) if what == "source" else ReversibleBlock(function, nn.Linear(3, 3))
    )
    compiled = compile_whole(sequence)
    x1, x2 = torch.randn(4, 3), torch.randn(4, 3, requires_grad=what == "source")
    compiled((x1, x2))[0].sum().backward()
    assert x2.grad is None
    function.gate[0] = True
    with pytest.raises(ReconstructionError, match=rf"`blocks\.0(\.f)?` {message}"):
        compiled((x1, x2))


def test_compiled_function_that_detaches_its_input():
    """The graph of a compiled function leads to its input, although the input receives no gradient."""
    sequence = ReversibleSequential(*[ReversibleBlock(nn.Linear(3, 3), Gated("source", False)) for _ in range(2)])
    twin = stored_twin(sequence)
    for block in sequence:
        block.compile(backend="aot_eager")
    x = torch.randn(4, 6)
    loss_of(compile_whole(sequence)(x)).backward()
    loss_of(twin(x)).backward()
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-5)


def test_function_that_returns_its_input():
    sequence = ReversibleSequential(CouplingLayer(nn.Identity(), updates=0))
    x1, x2 = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    y1, _ = compile_whole(sequence)((x1, x2))
    y1.sum().backward()
    assert torch.equal(x2.grad, torch.ones(4, 3))


def test_dependence_that_begins_before_the_backward_pass_raises():
    function = Gated("source", [False])
    sequence = ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), function))
    loss = compile_whole(sequence)(torch.randn(4, 6)).square().sum()
    function.gate[0] = True
    with pytest.raises(ReconstructionError, match=r"`blocks\.0\.g` depends on its input, but did not"):
        loss.backward()


def assert_step_as_twin(sequence, compiled, *args, **kwargs):
    """Check the gradients of one step against an uncompiled stored twin in the same state."""
    twin = stored_twin(sequence)
    for module, call in ((sequence, compiled), (twin, twin)):
        module.zero_grad()
        torch.manual_seed(1)
        call(*args, **kwargs).square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


def test_changed_switches_make_a_new_graph():
    gated, dropout = Gated("source", False), nn.Dropout(0.0)
    sequence = ReversibleSequential(
        ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3)),
        ReversibleBlock(gated, nn.Sequential(nn.Linear(3, 3), dropout)),
    ).double()
    compiled, x = compile_whole(sequence), torch.randn(4, 6, dtype=torch.float64)
    for gated.gate, dropout.p in ((False, 0.0), (True, 0.5), (False, 0.0)):
        assert_step_as_twin(sequence, compiled, x)


def test_changed_number_makes_no_new_graph():
    class Tempered(nn.Linear):
        temperature = 1.0

        def forward(self, x):
            return super().forward(x) / self.temperature

    function = Tempered(3, 3)
    sequence = ReversibleSequential(ReversibleBlock(function, nn.Linear(3, 3))).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    function.temperature = 0.9
    compiled = compile_whole(sequence)
    assert_step_as_twin(sequence, compiled, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        function.temperature = 0.8
        assert_step_as_twin(sequence, compiled, x)


def replaceable():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Tanh())


def test_replaced_layers():
    sequence = ReversibleSequential(*[ReversibleBlock(replaceable(), replaceable()) for _ in range(2)]).double()
    compiled, x = compile_whole(sequence), torch.randn(4, 6, dtype=torch.float64)
    assert_step_as_twin(sequence, compiled, x)
    sequence[0].f[0] = nn.BatchNorm1d(3).double()
    sequence[0].f[1] = nn.Linear(3, 3).double()
    assert_step_as_twin(sequence, compiled, x)
    assert sequence[0].f[0].num_batches_tracked == 1
    sequence[1].g[2] = nn.ReLU()
    sequence[1].f.append(nn.Linear(3, 3).double())
    assert_step_as_twin(sequence, compiled, x)


def test_layer_that_is_added_before_the_backward_pass_raises():
    sequence = ReversibleSequential(ReversibleBlock(replaceable(), replaceable()))
    loss = compile_whole(sequence)(torch.randn(4, 6)).sum()
    sequence[0].f.append(nn.Linear(3, 3))
    with pytest.raises(
        ReconstructionError, match=r"`blocks\.0\.f` has gained or lost a module, a parameter or a buffer"
    ):
        loss.backward()


@pytest.mark.parametrize(
    "options",
    [{"fullgraph": True}, pytest.param({"dynamic": True}, marks=pytest.mark.slow)],
    ids=["one-graph", "dynamic"],
)
def test_numbers_among_the_arguments(options):
    sequence = ReversibleSequential(ReversibleBlock(Scaled(), Scaled())).double()
    compiled = torch.compile(sequence, backend="aot_eager", **options)
    x = torch.randn(4, 6, dtype=torch.float64)
    for scale in (0.1, 0.2, 2, 3):
        assert_step_as_twin(sequence, compiled, x, scale=scale)


def test_sizes_among_the_arguments():
    sequence = ReversibleSequential(ReversibleBlock(Scaled(), Scaled())).double()
    compiled = compile_whole(lambda x: sequence(x, scale=x.shape[0]), dynamic=True)
    for size in (2, 3):
        x = torch.randn(size, 6, dtype=torch.float64)
        twin = stored_twin(sequence)
        assert_close(compiled(x), twin(x, scale=size))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_object_among_the_arguments_raises(fullgraph):
    class Scale:
        value = 2

    sequence = ReversibleSequential(ReversibleBlock(Scaled(), Scaled()))
    compiled = torch.compile(sequence, backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"argument `scale` is an object of Scale, in which a compiled reversible"):
        compiled(torch.randn(4, 6), scale=[Scale()])
    with pytest.raises(Exception, match=r"argument 0 after the input is an object of Scale"):
        compiled(torch.randn(4, 6), Scale(), scale=1)


def test_error_of_a_function_is_reported():
    """The trace would break the graph there, and report that the function cannot run on tensors without values."""

    class Missing(nn.Module):
        def forward(self, x):
            raise NotImplementedError("no argument is supported")

    x = torch.randn(4, 6)
    sequence = ReversibleSequential(ReversibleBlock(Scaled(), nn.Linear(3, 3)))
    with pytest.raises(Exception, match=r"TypeError: .*forward\(\) got an unexpected keyword argument 'scale'"):
        torch.compile(sequence, backend="aot_eager")(x, scale=2)
    with pytest.raises(Exception, match="no argument is supported"):
        torch.compile(ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), Missing())), backend="aot_eager")(x)
