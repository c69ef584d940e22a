import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from revnet import FixedPoint, PredictionError, Reverse, ReversibleBlock, ReversibleSequential, Store, set_coupling
from revnet._torch_release import RELEASE
from revnet.memory import measure, predict
from revnet.models import ResNet, ReversibleViT, RevNet
from tests.helpers import CASE, ConvResidual, all_cases, all_policies

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def assert_predicted(model, *inputs, **options):
    """Check that prediction and measurement agree to the byte, with all modules and the whole timeline."""
    measured = measure(model, *inputs, **options)
    predicted = predict(model, *inputs, **options)
    assert predicted == measured
    for name in ("activation_bytes", "gradient_bytes", "module_indices"):
        assert (getattr(predicted.timeline, name) == getattr(measured.timeline, name)).all()
    return predicted


@pytest.mark.parametrize("policy", [Reverse(), Store()], ids=["reverse", "store"])
@all_cases
def test_predicts_every_block(case, policy):
    arguments = case.sequence(2, policy), case.input(), *case.args()
    if "groups" in case.name and policy == Reverse():
        # A real run reads numbers after it has freed a sum of streams and before it frees a stream. A prediction has no
        # numbers, so both become one event.
        assert predict(*arguments, kwargs=case.kwargs()) == measure(*arguments, kwargs=case.kwargs())
    else:
        assert_predicted(*arguments, kwargs=case.kwargs())


@all_policies
@pytest.mark.parametrize("name", ["conv-dropout", "attention-context-mask"])
def test_predicts_every_policy(name, policy):
    case = CASE[name]
    x = case.input(requires_grad=False)
    assert_predicted(case.sequence(4, policy), x, *case.args(), kwargs=case.kwargs())


MODELS = {
    "revnet": partial(RevNet, num_blocks=(1, 1), widths=(4, 4, 8)),
    "stored-revnet": partial(RevNet, num_blocks=(1, 1), widths=(4, 4, 8), policy=Store()),
    "bottlenecks": partial(RevNet, num_blocks=(2,), widths=(4, 8), block="bottleneck", stem="large"),
    "vit": partial(ReversibleViT, img_size=16, patch_size=4, dim=8, depth=2, num_heads=2, num_classes=10),
    "resnet": partial(ResNet, num_blocks=(1, 1), widths=(4, 4, 8)),
}


@pytest.mark.parametrize(
    ("optimizer", "autocast"),
    [(SGD, None), (torch.optim.AdamW, torch.bfloat16)],
    ids=["SGD", "AdamW-bfloat16"],
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_predicts_networks(make, optimizer, autocast):
    model = make()
    few, many = (
        assert_predicted(model, torch.randn(batch_size, 3, 16, 16), optimizer=optimizer, autocast=autocast)
        for batch_size in (2, 6)
    )
    assert few.activation_bytes < many.activation_bytes
    assert few.optimizer_bytes == many.optimizer_bytes


@pytest.mark.parametrize("name", ["revnet", "bottlenecks", "vit"])
def test_predicts_fixed_point_couplings(name):
    """They hold the same bytes as floating-point couplings."""
    model, images = MODELS[name](), torch.randn(2, 3, 16, 16)
    held_bytes = predict(model, images).held_bytes
    set_coupling(model, FixedPoint())
    assert assert_predicted(model, images, optimizer=SGD).held_bytes == held_bytes


def test_predicts_small_streams_of_another_dtype_than_the_residuals():
    block = ReversibleBlock(nn.Identity(), nn.Identity(), coupling=FixedPoint(is_wide=True))
    assert_predicted(ReversibleSequential(block), torch.randn(3, 8, requires_grad=True))


def test_predicts_convolutions_of_single_pixels():
    """The strides of a map of 1 x 1 decide which kernel the convolution runs."""
    layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1)
    assert_predicted(nn.Sequential(*layers), torch.randn(5, 3, 4, 4).contiguous(memory_format=torch.channels_last))


class Attends(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Recurs(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)

    use_reentrant = False


class CheckpointedReentrant(Checkpointed):
    use_reentrant = True


class NormsChannels(nn.LayerNorm):
    """Layer norm over the channels of images, between permutations."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Joins(nn.Module):
    """Model in which autograd has to copy gradients, since they are views or are shared."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = x @ torch.cat([self.a.weight, self.b.weight]).T
        return y + (self.a.bias + self.b.bias).repeat(2) + torch.tensor(2.0)


SEQUENCE, IMAGES = (2, 6, 8), (2, 8, 8, 8)
LAYERS = {
    "layer-norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), SEQUENCE),
    "permuted-layer-norm": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), NormsChannels(8), nn.Conv2d(8, 8, 3)), IMAGES),
    "group-norm": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3)), IMAGES),
    "instance-norm": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True)), IMAGES),
    "batch-norm": (lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), IMAGES),
    "no-parameters": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False)), IMAGES),
    "attention": (lambda: Attends(8, 2, batch_first=True), SEQUENCE),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SEQUENCE),
    "recurrent": (lambda: Recurs(8, 8, 2, dropout=0.1, bidirectional=True), SEQUENCE),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=8), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 3), nn.Upsample(scale_factor=2)
        ),
        IMAGES,
    ),
    "activations": (
        lambda: nn.Sequential(
            nn.Linear(8, 8), nn.GELU(), nn.Dropout(), nn.Softmax(-1), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.GLU()
        ),
        SEQUENCE,
    ),
    "checkpoint": (lambda: Checkpointed(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 8)), SEQUENCE),
    "reentrant": (lambda: CheckpointedReentrant(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), SEQUENCE),
    "joins": (Joins, SEQUENCE),
}


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_predicts_layers(make, shape, precision):
    model, x = make(), torch.randn(shape)
    if precision == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    assert_predicted(model, x.requires_grad_(), autocast=torch.bfloat16 if precision == "autocast" else None)


def test_predicts_with_a_loss():
    labels = torch.tensor([1, 2, 0, 5])

    def loss(logits):
        return F.cross_entropy(logits, labels)

    model, x = RevNet(num_blocks=(1, 1), widths=(4, 4, 8)), torch.randn(4, 3, 8, 8)
    assert_predicted(model, x, loss=loss)
    assert_predicted(model, x, loss=loss, autocast=torch.bfloat16)


@pytest.mark.parametrize("change", ["evaluation", "frozen", "channels last", "float64"])
def test_predicts_a_model_in_any_state(change):
    model, x = RevNet(num_blocks=(1, 1), widths=(8, 8, 16)), torch.randn(2, 3, 8, 8)
    if change == "evaluation":
        model.eval()
    elif change == "frozen":
        model.stem.requires_grad_(False)
        model.stages[0].requires_grad_(False)
    elif change == "channels last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    else:
        model, x = model.double(), x.double()
    assert_predicted(model, x, optimizer=torch.optim.AdamW)


class Tied(nn.Module):
    """Weight with two names, as in language models, and a weight that shares its data."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.other = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight
        self.other.weight.data = self.embed.weight.data

    def forward(self, tokens):
        y = torch.tanh(self.embed(tokens))
        return self.head(y) + self.other(y)


def test_tied_parameters_count_once():
    memory = assert_predicted(Tied(), torch.arange(8).view(2, 4), optimizer=torch.optim.AdamW)
    assert memory.parameter_bytes == 20 * 6 * 4
    assert memory.gradient_bytes == 2 * 20 * 6 * 4, "weights that share data have separate gradients"
    assert memory.optimizer_bytes == 2 * (2 * 20 * 6 * 4 + 4)


def test_predicts_on_the_meta_device():
    """A step may be far larger than the memory of any machine."""
    make = partial(RevNet, num_blocks=(1, 1), widths=(32, 32, 64))
    expected = predict(make(), torch.randn(1, 3, 32, 32))
    with torch.device("meta"):
        model, x = make(), torch.empty(1, 3, 32, 32)
        assert predict(model, x) == expected
    assert predict(model, x) == expected
    assert predict(model, torch.empty(2**20, 3, 224, 224, device="meta")).peak_bytes > 2**45
    assert all(parameter.is_meta for parameter in model.parameters())


def test_predicts_another_data_type():
    model, x = RevNet(num_blocks=(1, 1), widths=(8, 8, 16)), torch.randn(2, 3, 8, 8)
    expected = predict(copy.deepcopy(model).double(), x.double(), optimizer=SGD)
    assert predict(model, x, dtype=torch.float64, optimizer=SGD) == expected
    assert expected.parameter_bytes == 2 * predict(model, x).parameter_bytes
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_predicts_recurrent_layers_with_flat_weights(name):
    model = getattr(nn, name)(4, 6, num_layers=2)
    x = torch.randn(3, 2, 4)
    memory = predict(model, x, loss=lambda output: output[0].sum())
    assert memory.gradient_bytes == memory.parameter_bytes
    model(x)[0].sum().backward()
    assert not any(isinstance(weight, FakeTensor) for weight in model._flat_weights)


def test_predicts_tensors_that_are_plain_attributes():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.mask = torch.ones(8, 4)

        def forward(self, x):
            return self.linear(x) * self.mask[: len(x)]

    memory = assert_predicted(Masked(), torch.randn(3, 4))
    assert memory.held_bytes == 4, "only the loss; the mask is not an activation"


class Mask:
    def __init__(self):
        self.values = torch.tril(torch.ones(8, 8))


class Masked(nn.Module):
    """A module that keeps a mask without registering it."""

    def __init__(self, place):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        mask = torch.tril(torch.ones(8, 8))
        self.place = place
        if place == "attribute":
            self.mask = mask
        elif place == "list":
            self.masks = [(mask,)]
        elif place == "object":
            self.mask = Mask()
        elif place == "module":
            self.modules_of_my_own = [nn.Linear(8, 8)]
        else:
            self.make_mask = lambda: mask

    def forward(self, x):
        masks = {
            "attribute": lambda: self.mask,
            "list": lambda: self.masks[0][0],
            "object": lambda: self.mask.values,
            "module": lambda: self.modules_of_my_own[0].weight,
            "closure": lambda: self.make_mask(),
        }
        return x + masks[self.place]() @ self.linear(x)


@pytest.mark.parametrize("place", ["attribute", "list", "object", "module"])
def test_tensors_that_are_not_registered_may_be_on_the_meta_device(place):
    expected = predict(nn.Sequential(Masked(place), Masked(place)), torch.randn(8, 4))
    with torch.device("meta"):
        model = nn.Sequential(Masked(place), Masked(place))
    assert predict(model, torch.randn(8, 4)) == expected
    if place == "attribute":
        assert model[0].mask.is_meta


def test_a_hidden_tensor_on_the_meta_device_is_explained():
    with torch.device("meta"):
        model = Masked("closure")
    with pytest.raises(PredictionError, match=r"devices.*; use `register_buffer` for tensors that a module keeps"):
        predict(model, torch.randn(8, 4))


def resize(twice=False):
    y = torch.empty(1000 if twice else 0)
    y.resize_(50, 50)


def fill_out():
    torch.mm(torch.ones(50, 1), torch.ones(1, 50), out=torch.empty(0))


def resize_as():
    torch.empty(0).resize_as_(torch.ones(50, 50))


def set_and_resize():
    y = torch.empty(7)
    y.set_()
    y.resize_(50, 50)


@pytest.mark.parametrize(
    ("grow", "num_bytes"),
    [
        (resize, 50 * 50 * 4),
        (partial(resize, twice=True), (1000 + 50 * 50) * 4),  # the old memory is copied into the new
        (fill_out, (50 + 50 + 50 * 50) * 4),
        (resize_as, 2 * 50 * 50 * 4),
        (set_and_resize, 50 * 50 * 4),
    ],
    ids=["resize", "resize-twice", "out", "resize-as", "set"],
)
def test_storages_that_grow(grow, num_bytes):
    class Grows(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                grow()
            return super().forward(x)

    assert assert_predicted(Grows(4, 4), torch.randn(2, 4)).activation_bytes == num_bytes


# The model is left unchanged ------------------------------------------------------------------------------------------


class Caching(nn.Module):
    """Stores what it computed as an attribute, in a list and in a dict, and counts its calls."""

    def __init__(self, fails=False):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.table = None
        self.seen = []
        self.tables = {"old": 1}
        self.num_calls = 0
        self.fails = fails

    def forward(self, x):
        self.num_calls += 1
        if self.table is None:
            self.table = torch.arange(3.0)
        self.seen.append(x)
        self.tables["new"] = self.table
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        self.extra = self.mean
        y = self.linear(x + self.table)
        if self.fails:
            raise ValueError("this model cannot")
        return y + torch.rand(3)


@pytest.mark.parametrize("fails", [False, True])
def test_does_not_change_the_model(fails):
    model = Caching(fails)
    model.linear.weight.grad = torch.ones(3, 3)
    parameters = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
    mean, gradient, state = model.mean, model.linear.weight.grad, torch.get_rng_state()
    if fails:
        with pytest.raises(PredictionError, match=r"this model cannot"):
            predict(model, torch.randn(2, 3, generator=torch.Generator()))
    else:
        predict(model, torch.randn(2, 3, generator=torch.Generator()), optimizer=torch.optim.AdamW)
    for name, (tensor, value) in parameters.items():
        assert model.get_parameter(name) is tensor
        assert torch.equal(tensor, value)
        assert not tensor._post_accumulate_grad_hooks
    assert model.mean is mean
    assert model.linear.weight.grad is gradient
    assert model.linear.bias.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.table, model.seen, model.tables, model.num_calls) == (None, [], {"old": 1}, 0)
    assert not hasattr(model, "extra")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    if not fails:
        model(torch.randn(2, 3)).sum().backward()
        pickle.dumps(model)


def test_does_not_change_the_inputs():
    x = torch.randn(2, 3, requires_grad=True)
    before = x * 2
    predict(nn.Linear(3, 3), before)
    measure(nn.Linear(3, 3), before)
    measure(nn.Linear(3, 3), x)
    assert x.grad is None
    before.sum().backward()  # the graph of the input still exists
    assert x.grad is not None


def test_does_not_change_parameters_of_the_loss():
    """Their gradients count as activations, and their `grad` is restored."""
    model, head, x = nn.Linear(3, 3), nn.Linear(3, 1, bias=False), torch.randn(2, 3)
    head.weight.grad = gradient = torch.ones(1, 3)
    memory = assert_predicted(model, x, loss=lambda y: head(y).sum())
    assert memory.gradient_bytes == memory.parameter_bytes == 4 * (3 * 3 + 3)
    assert head.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(1, 3))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_disabled(context):
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    expected = measure(model, x)
    with context():
        assert assert_predicted(model, x) == expected


def test_the_result_can_be_pickled():
    memory = predict(nn.Linear(3, 3), torch.randn(2, 3))
    again = pickle.loads(pickle.dumps(memory))
    assert again == memory
    assert (again.timeline.activation_bytes == memory.timeline.activation_bytes).all()


# Errors ---------------------------------------------------------------------------------------------------------------


class Runs(nn.Module):
    """Model that ends in a given function."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.last = Last(function)

    def forward(self, x):
        return self.last(self.linear(x))


class Last(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (lambda x: x * x.sum().item(), r"it asks for the value of a tensor \(`.item\(\)`, `if x > 0`\)"),
        (lambda x: x if x.sum() > 0 else -x, "it asks for the value of a tensor"),
        (lambda x: x[x > 0], r"a shape depends on values \(aten.nonzero.default\)"),
        (lambda x: x * x.detach().numpy().sum(), r"it needs data \(RuntimeError: .numpy\(\) is not supported"),
    ],
)
def test_rejects_a_model_that_needs_values(function, cause, caplog, capfd):
    message = rf"^the forward pass of `last` of Runs cannot be predicted, because {cause}.*; measure it with "
    with pytest.raises(PredictionError, match=message) as caught:
        predict(Runs(function), torch.randn(2, 3))
    assert "\n" not in str(caught.value)
    assert measure(Runs(function), torch.randn(2, 3)).peak_bytes > 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x @ torch.ones(5, 5), "the forward pass of `last` of Runs failed, on inputs of shape .2, 3.: Runt"),
        (lambda x: None + x, "`last` of Runs failed, on inputs of shape .2, 3.: TypeError: unsupported operand"),
    ],
)
def test_an_error_of_the_model_is_reported_as_such(function, message, caplog):
    with pytest.raises(PredictionError, match=message) as caught:
        predict(Runs(function), torch.randn(2, 3))
    assert "\n" not in str(caught.value)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_rejects_scripts():
    x = torch.randn(2, 3)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = nn.Sequential(torch.jit.trace(plain, x))
    assert measure(model, x).gradient_bytes == measure(plain, x).gradient_bytes
    with pytest.raises(PredictionError, match=r"^`0` of Sequential is TorchScript, .*; use `revnet.memory.measure`"):
        predict(model, x)


def test_reports_errors_in_the_loss_and_in_the_arguments():
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    with pytest.raises(
        PredictionError, match=r"the loss of Linear failed, on inputs of shape .2, 3.: RuntimeError: sh"
    ):
        predict(model, x, loss=lambda y: y.view(5))
    with pytest.raises(
        PredictionError, match=r"the forward pass of Linear failed, without inputs: TypeError: .*missing"
    ):
        predict(model)
    with pytest.raises(PredictionError, match=r"a tensor of layout torch.sparse_coo of shape .* cannot be predicted"):
        predict(model, x.to_sparse())


class Returning(nn.Linear):
    """A model that returns what a function makes of its output."""

    def __init__(self, change):
        super().__init__(3, 3)
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


class Lookup(nn.Embedding):
    """An embedding without a kernel of its own."""

    def forward(self, x):
        return self.weight[x]


def test_error_about_a_dtype_says_what_to_pass():
    with pytest.raises(PredictionError, match=r"tensors used as indices.*; pass inputs of another dtype$"):
        predict(Lookup(4, 3), torch.randn(2, 5))
    if RELEASE >= (2, 12):  # Earlier, the shape function of an embedding took any dtype.
        with pytest.raises(PredictionError, match=r"scalar type.*; pass inputs of another dtype$"):
            predict(nn.Embedding(4, 3), torch.randn(2, 5))


@pytest.mark.parametrize("call", [measure, predict])
def test_rejects_wrong_arguments(call):
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"^`model` \(=Linear\) has no output that requires a gradient.*; unfreeze"):
        call(nn.Linear(3, 3).requires_grad_(False), x)
    with pytest.raises(ValueError, match=r"^`model` \(=Returning\) has no output .*; do not detach the output"):
        call(Returning(lambda y: y.detach()), x)
    with pytest.raises(ValueError, match=r"^`model` \(=Returning\) returned None, which holds no tensor.*`loss=`"):
        call(Returning(lambda y: None), x)
    with pytest.raises(
        ValueError, match=r"^`model` \(=Returning\) returned an object of the class str, which holds no"
    ):
        call(Returning(lambda y: "text"), x)
    with pytest.raises(ValueError, match=r"^`model` \(=Returning\) returned tensors of torch.int64, which have no"):
        call(Returning(lambda y: y.argmax(1)), x)
    with pytest.raises(ValueError, match=r"^`loss` of `model` \(=Linear\) returned a tensor that requires no gradient"):
        call(model, x, loss=lambda y: y.detach().sum())
    with pytest.raises(TypeError, match=r"^`loss` returned a tensor of shape \(2, 3\); it must return a scalar tensor"):
        call(model, x, loss=lambda y: y)
    with pytest.raises(TypeError, match=r"^`loss` returned float; it must return a scalar tensor"):
        call(model, x, loss=lambda y: 1.0)
    with pytest.raises(ValueError, match=r"^`model` \(=LazyLinear\) has no shape yet for `weight`; call it once"):
        call(nn.LazyLinear(3), x)
    with pytest.raises(TypeError, match=r"^`model` \(=function\) must be a module"):
        call(lambda x: x, x)
    with pytest.raises(TypeError, match=r"^`kwargs` \(=list\) must be a dict"):
        call(model, x, kwargs=[1])
    with pytest.raises(TypeError, match=r"^`loss` \(='mse'\) must be a function"):
        call(model, x, loss="mse")
    with pytest.raises(TypeError, match=r"^`autocast` \(='bf16'\) must be `torch.bfloat16`, `torch.float16` or None"):
        call(model, x, autocast="bf16")


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": torch.optim.Adafactor,
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "nadam": torch.optim.NAdam,
}


@pytest.mark.parametrize("call", [measure, predict])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimizer_counts_like_its_factory(call, make):
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)), torch.randn(2, 30)
    optimizer = make(model.parameters())
    assert call(model, x, optimizer=optimizer) == call(model, x, optimizer=make)
    assert not optimizer.state
    held = optimizer.param_groups[0]["params"]
    assert all(parameter is own for parameter, own in zip(held, model.parameters(), strict=True))


@pytest.mark.parametrize("call", [measure, predict])
def test_counts_parameter_groups(call):
    """One layer has momentum, one does not, and the optimizer leaves out a frozen layer."""
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3), nn.Linear(3, 3)), torch.randn(2, 30)
    model[2].requires_grad_(False)
    groups = [{"params": model[1].named_parameters(), "momentum": 0.9}, {"params": model[0].named_parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert call(model, x, optimizer=optimizer).optimizer_bytes == (20 * 3 + 3) * 4


@pytest.mark.parametrize("call", [measure, predict])
def test_rejects_wrong_optimizers(call):
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"^`optimizer` \(=SGD\) holds a parameter that `model` does not have; pass"):
        call(model, x, optimizer=torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"^`optimizer` \(='adamw'\) must be an optimizer of the model, or make one"):
        call(model, x, optimizer="adamw")
    with pytest.raises(TypeError, match=r"^`optimizer` \(=list\) returned a list; it must return a `torch.optim.Opt"):
        call(model, x, optimizer=list)
    with pytest.raises(ValueError, match=r"^`optimizer` \(=LBFGS\) cannot take a step on gradients alone: TypeError: "):
        call(model, x, optimizer=torch.optim.LBFGS)
    with pytest.raises(
        ValueError, match=r"^`optimizer` \(=SGD\) cannot be created: ValueError: Invalid learning rate: -1"
    ):
        call(model, x, optimizer=partial(torch.optim.SGD, lr=-1))
    with pytest.raises(ValueError, match=r"^`optimizer` \(=<lambda>\) must make an optimizer of the parameters that"):
        call(model, x, optimizer=lambda _: torch.optim.SGD(model.parameters()))


def test_rejects_a_wrong_device_or_data_type():
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"^`device` \(='gpu'\) must be a device of PyTorch, such as 'cpu' or 'cuda'"):
        predict(model, x, device="gpu")
    with pytest.raises(TypeError, match=r"^`dtype` \(=torch.int8\) must be a floating-point type"):
        predict(model, x, dtype=torch.int8)
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"^`device` \(=cuda\) is on a device that PyTorch cannot use here; predict"
        ):
            predict(model, x, device="cuda")


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [None, Store()], ids=["reverse", "store"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_agrees_with_the_allocator_of_a_gpu(policy, autocast):
    blocks = [ReversibleBlock(ConvResidual(32), ConvResidual(32)) for _ in range(16)]
    model = ReversibleSequential(*blocks, **({} if policy is None else {"policy": policy})).cuda()
    x = torch.randn(64, 64, 32, 32, device="cuda")
    measure(model, x, autocast=autocast)  # libraries allocate their workspaces at the first step
    predicted = predict(model, x, autocast=autocast)
    assert predicted == measure(model, x, autocast=autocast)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(x).sum()
    loss.backward()
    constants = predicted.parameter_bytes + predicted.buffer_bytes + predicted.input_bytes
    growth = torch.cuda.max_memory_allocated() - before
    assert predicted.peak_bytes - constants == pytest.approx(growth, rel=0.05)


@pytest.mark.gpu
def test_reports_the_figures_of_a_gpu():
    model = nn.Linear(1024, 1024).cuda()
    memory = measure(model, torch.randn(64, 1024, device="cuda"))
    assert memory.cuda.allocated_bytes >= memory.peak_bytes
    assert memory.cuda.device_bytes >= memory.cuda.reserved_bytes >= memory.cuda.allocated_bytes
    assert "in use on the device" in str(memory)


@pytest.mark.gpu
def test_predicts_the_optimizer_of_a_gpu():
    """PyTorch updates all parameters at once on a GPU, with temporaries for all of them."""
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(8)]).cuda()
    x = torch.randn(4, 512, device="cuda")
    predicted = predict(model, x, optimizer=torch.optim.AdamW)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
    growth = torch.cuda.max_memory_allocated() - before
    assert predicted.peak_phase == "optimizer"
    constants = predicted.parameter_bytes + predicted.buffer_bytes + predicted.input_bytes
    assert predicted.peak_bytes - constants == pytest.approx(growth, rel=0.05)


class Answer(OrderedDict):
    """A class that PyTorch's pytrees do not know."""


@dataclass
class Scores:
    scores: torch.Tensor
    note: str = "ours"


class Opaque:
    def __init__(self, scores):
        self.scores = scores


class Wrapping(nn.Linear):
    def __init__(self, wrap):
        super().__init__(2, 3)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


def wrapped(kind):
    return {"dict": lambda y: Answer(scores=y), "dataclass": Scores, "nested": lambda y: [Scores(Answer(scores=y))]}[
        kind
    ]


@pytest.mark.parametrize("kind", ["dict", "dataclass", "nested"])
def test_finds_the_tensors_in_the_classes_of_the_user(kind):
    x, model = torch.ones(4, 2), Wrapping(wrapped(kind))
    assert predict(model, x).peak_bytes == measure(model, x).peak_bytes == predict(nn.Linear(2, 3), x).peak_bytes


@pytest.mark.parametrize("count", [predict, measure])
def test_asks_for_a_loss_where_it_finds_no_tensor(count):
    model, x = Wrapping(Opaque), torch.ones(4, 2)
    with pytest.raises(
        ValueError, match=r"^`model` \(=Wrapping\) returned an object of the class Opaque.*pass `loss=`"
    ):
        count(model, x)
    assert count(model, x, loss=lambda output: output.scores.sum()).peak_bytes > 0
