"""The loss in chunks equals the loss of whole logits, in value, gradient and second derivative."""

import pytest
import torch
from torch.nn import functional as F

from revnet.functional import linear_cross_entropy
from revnet.functional._linear_cross_entropy import default_chunk_size
from tests.helpers import assert_close

NUM_ROWS, NUM_FEATURES, NUM_CLASSES = 24, 8, 50


def make_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(NUM_CLASSES, (NUM_ROWS,), generator=generator)
    targets[::5] = -100
    return (random(NUM_ROWS, NUM_FEATURES), random(NUM_CLASSES, NUM_FEATURES), random(NUM_CLASSES)), targets


def whole(inputs, targets, **options):
    x, weight, bias = inputs
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, **options)


def chunked(inputs, targets, **options):
    x, weight, bias = inputs
    return linear_cross_entropy(x, weight, targets, bias=bias, **options)


def error(gradients, exact):
    return max(float((own.double() - right).norm() / right.norm()) for own, right in zip(gradients, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_small_integer_types(dtype):
    """In uint8, -100 is 156."""
    num_classes = 100 if dtype is torch.int8 else 200
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(num_classes, 4)
    targets = torch.tensor([0, 1, 56, 98, 99, 99 if dtype is torch.int8 else 156], dtype=dtype)
    actual = linear_cross_entropy(x, weight, targets)
    expected = F.cross_entropy(x @ weight.T, targets.long())
    assert_close(actual, expected, tolerance=1e-6)
    assert_close(*[torch.autograd.grad(loss, x)[0] for loss in (actual, expected)], tolerance=1e-6)


def test_autocast_leaves_double_precision_alone():
    inputs, targets = make_inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss(inputs, targets) for loss in (chunked, whole)]
        second = [torch.autograd.grad(loss, inputs, create_graph=True) for loss in losses]
    assert_close(*losses)
    assert_close(*second)
    x, weight, bias = inputs
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"`weight` has dtype torch\.float32, but"),
    ):
        linear_cross_entropy(x, weight.float(), targets, bias=bias)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"`bias` has dtype torch\.float64, but"):
        linear_cross_entropy(x.float(), weight.float(), targets, bias=bias)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, NUM_ROWS, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"ignore_index": 3}]
)
def test_equals_whole_logits(chunk_size, options):
    inputs, targets = make_inputs(torch.float64)
    if "ignore_index" in options:
        targets[targets == -100] = 3
    losses = chunked(inputs, targets, chunk_size=chunk_size, **options), whole(inputs, targets, **options)
    assert_close(losses[0], losses[1], tolerance=1e-13)
    gradients = [torch.autograd.grad(loss, inputs) for loss in losses]
    assert_close(gradients[0], gradients[1], tolerance=1e-13)
    with torch.no_grad():
        assert_close(chunked(inputs, targets, chunk_size=chunk_size, **options), losses[1], tolerance=1e-13)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.5, 0.9])
def test_smoothing_with_a_class_that_is_impossible(label_smoothing):
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 0, 0, -torch.inf])
    losses = [
        function((x, weight, bias), torch.tensor([0, 1]), label_smoothing=label_smoothing)
        for function in (chunked, whole)
    ]
    assert losses[0] == losses[1] == torch.inf


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_frozen_inputs(frozen):
    inputs, targets = make_inputs(torch.float64)
    for index in frozen:
        inputs[index].requires_grad_(False)
    losses = chunked(inputs, targets, chunk_size=7), whole(inputs, targets)
    assert losses[0].requires_grad == losses[1].requires_grad == (len(frozen) < 3)
    if len(frozen) < 3:
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        first, second = (torch.autograd.grad(loss, trained) for loss in losses)
        assert_close(first, second, tolerance=1e-13)


def test_without_bias_and_with_leading_dimensions():
    (x, weight, _), targets = make_inputs(torch.float64)
    x, targets = x.unflatten(0, (2, 3, 4)), targets.unflatten(0, (2, 3, 4)).int()
    own = linear_cross_entropy(x, weight, targets, chunk_size=5)
    right = F.cross_entropy(F.linear(x, weight).flatten(0, -2), targets.flatten().long())
    first, second = (torch.autograd.grad(loss, (x, weight)) for loss in (own, right))
    assert_close(first, second, tolerance=1e-13)
    strided = linear_cross_entropy(x.detach().transpose(0, 1), weight, targets.transpose(0, 1))
    assert_close(strided, right, tolerance=1e-13)


def test_second_derivatives():
    inputs, targets = make_inputs(torch.float64)
    results = []
    for function, options in ((chunked, {"chunk_size": 7}), (whole, {})):
        loss = function(inputs, targets, label_smoothing=0.1, **options)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        results.append((penalty, torch.autograd.grad(penalty, inputs)))
    assert_close(results[0], results[1], tolerance=1e-13)


# PyTorch's compiler makes an instance of every `autograd.Function`, for which it warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("how", ["all leaves", "one leaf", "grad"])
def test_second_derivatives_of_compiled_code_raise(how):
    """With this backend nothing else would raise, and the gradients would lack terms."""
    inputs, targets = make_inputs(torch.float64)
    loss = torch.compile(chunked, backend="eager")(inputs, targets, chunk_size=7)
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    penalty = loss + grad.square().sum()
    ways = {
        "all leaves": penalty.backward,
        "one leaf": lambda: penalty.backward(inputs=[inputs[1]]),
        "grad": lambda: torch.autograd.grad(penalty, inputs[1]),
    }
    with pytest.raises(NotImplementedError, match="a compiled `linear_cross_entropy` has no second derivatives"):
        ways[how]()


def test_batched_gradients():
    inputs, targets = make_inputs(torch.float64)
    factors = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for options in ({}, {"retain_graph": True}, {"create_graph": True}):
        first, second = (
            torch.autograd.grad(loss, inputs, factors, is_grads_batched=True, **options)
            for loss in (chunked(inputs, targets, chunk_size=7), whole(inputs, targets))
        )
        assert_close(first, second, tolerance=1e-13)
    weight = inputs[1].detach()
    jacobians = [
        torch.autograd.functional.jacobian(
            lambda weight, function=function: function([inputs[0], weight, inputs[2]], targets), weight, vectorize=True
        )
        for function in (chunked, whole)
    ]
    assert_close(*jacobians, tolerance=1e-13)


def test_second_backward_pass():
    inputs, targets = make_inputs(torch.float64)
    loss = chunked(inputs, targets, chunk_size=7)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_close(torch.autograd.grad(3 * loss, inputs), [3 * gradient for gradient in first], tolerance=1e-13)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


def test_transforms_explain_targets():
    (x, weight, _), targets = make_inputs()
    message = "`targets` must be from 0 to 49, or -100 for rows that do not count"
    with pytest.raises(ValueError, match=f"{message}, but the others range from 50 to 50; use"):
        torch.func.grad(lambda x: linear_cross_entropy(x, weight, torch.full_like(targets, 50)))(x)
    with pytest.raises(ValueError, match=f"{message}; use a layer"):
        torch.func.vmap(lambda targets: linear_cross_entropy(x, weight, targets))(torch.full((2, NUM_ROWS), 50))


# PyTorch's rules for forward mode use a deprecated function.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_transforms_of_functions():
    (x, weight, bias), targets = make_inputs(torch.float64)

    def loss(x):
        return linear_cross_entropy(x, weight, targets, bias=bias, chunk_size=7)

    assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(x), x)[0], tolerance=1e-13)
    tangent = torch.ones_like(x)
    _, derivative = torch.func.jvp(loss, (x.detach(),), (tangent,))
    assert_close(derivative, (torch.autograd.grad(loss(x), x)[0] * tangent).sum(), tolerance=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_in_low_precision(dtype):
    """The gradients are not much farther from float64 than the gradients of whole logits."""
    inputs, targets = make_inputs()
    exact = torch.autograd.grad(whole([tensor.double() for tensor in inputs], targets), inputs)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    loss = chunked(low, targets, chunk_size=7)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, low)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    assert error(gradients, exact) <= 4 * error(torch.autograd.grad(whole(low, targets), low), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs, targets = make_inputs()
    exact = torch.autograd.grad(whole([tensor.double() for tensor in inputs], targets), inputs)
    with torch.autocast("cpu", dtype):
        losses = chunked(inputs, targets, chunk_size=7), whole(inputs, targets)
    assert losses[0].dtype == torch.float32
    # The logits are the same in both, up to the order of sums in a matrix product.
    assert (losses[0] - losses[1]).abs() <= torch.finfo(dtype).eps * losses[1]
    own, right = (torch.autograd.grad(loss, inputs) for loss in losses)
    assert {gradient.dtype for gradient in own} == {torch.float32}
    assert error(own, exact) <= 4 * error(right, exact)


def test_gradients_in_half_precision_do_not_vanish():
    """The mean over many rows makes gradients that float16 cannot hold; loss scaling must not be needed for them."""
    x = torch.ones(2**16, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(512, 1, dtype=torch.float16, requires_grad=True)
    targets = torch.arange(2**16) % 512
    with torch.no_grad():
        weight[:2] = 1
    linear_cross_entropy(x, weight, targets).backward()
    assert weight.grad.isfinite().all()
    assert weight.grad[2:].abs().min() > 0


def test_all_rows_ignored():
    inputs, targets = make_inputs()
    losses = [function(inputs, torch.full_like(targets, -100)) for function in (chunked, whole)]
    assert all(loss.isnan() for loss in losses)
    for loss in losses:
        assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(loss, inputs))


def test_no_rows():
    (x, weight, bias), targets = make_inputs()
    loss = linear_cross_entropy(x[:0], weight, targets[:0], bias=bias)
    assert loss.isnan()
    assert linear_cross_entropy(x[:0], weight, targets[:0], bias=bias, reduction="sum") == 0


# PyTorch's compiler makes an instance of every `autograd.Function`, for which it warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph():
    inputs, targets = make_inputs(torch.float64)
    compiled = torch.compile(chunked, fullgraph=True, backend="aot_eager")
    for count in (NUM_ROWS, NUM_ROWS - 3):
        own = [inputs[0].detach()[:count].requires_grad_(), *inputs[1:]]
        losses = compiled(own, targets[:count], chunk_size=12), whole(own, targets[:count])
        assert_close(*(torch.autograd.grad(loss, own) for loss in losses), tolerance=1e-13)


@pytest.mark.parametrize(
    ("num_rows", "num_classes", "num_features", "size"),
    [
        (4096, 50_257, 256, 256),  # as large as the weight
        (2**20, 50_257, 256, 20_972),  # four times the features
        (4096, 65, 256, 4096),  # a small vocabulary: one chunk
        (10, 50_257, 256, 10),
        (0, 50_257, 256, 1),
        (1025, 40_960, 256, 205),  # five chunks of equal size
    ],
)
def test_default_size_of_a_chunk(num_rows, num_classes, num_features, size):
    assert default_chunk_size(num_rows, num_classes, num_features) == size


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"`x` \(=\[1.0\]\) must be a tensor"),
        ({"x": torch.ones(24, 8, dtype=torch.long)}, TypeError, "`x` has dtype torch.int64, but must be floating"),
        ({"x": torch.ones(24, 8).double()}, TypeError, "`weight` has dtype torch.float32, but `x` has torch.float64"),
        ({"x": torch.ones(24, 7)}, ValueError, r"`x` has shape \(24, 7\), but must have \(..., 8\)"),
        ({"weight": torch.ones(8)}, ValueError, r"`weight` has shape \(8,\), but must have \(V, D\)"),
        ({"bias": torch.ones(8)}, ValueError, r"`bias` has shape \(8,\), but must have \(50,\)"),
        ({"targets": torch.ones(24)}, TypeError, "`targets` has dtype torch.float32, but must hold integers"),
        ({"targets": torch.ones(23).long()}, ValueError, r"`targets` has shape \(23,\), but must have \(24,\)"),
        ({"targets": torch.full((24,), 50)}, ValueError, "`targets` must be from 0 to 49, .* range from 50 to 50"),
        ({"targets": torch.full((24,), -1)}, ValueError, "`targets` must be from 0 to 49, .* range from -1 to -1"),
        ({"reduction": "none"}, ValueError, r"`reduction` \(='none'\) must be 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, ValueError, r"`label_smoothing` \(=1.5\) must be a number from 0 to 1"),
        ({"ignore_index": 0.5}, TypeError, r"`ignore_index` \(=0.5\) must be an integer"),
        ({"ignore_index": 2**63}, ValueError, r"`ignore_index` \(=9223372036854775808\) must fit into 64 bits"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` \(=0\) must be a positive integer"),
    ],
)
def test_rejects_wrong_arguments(changes, error, message):
    (x, weight, bias), targets = make_inputs()
    with pytest.raises(error, match=message) as caught:
        linear_cross_entropy(**{"x": x, "weight": weight, "targets": targets, "bias": bias} | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_ignored_rows_may_hold_anything(value):
    x, weight = torch.randn(4, 6), torch.randn(9, 6)
    targets = torch.tensor([0, -100, 2, 3])
    kept = targets != -100
    x[~kept] = value
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    rest = x.detach()[kept].requires_grad_()
    expected = F.cross_entropy(rest @ weight.T, targets[kept])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient[kept], *torch.autograd.grad(expected, rest))
    assert gradient[~kept].eq(0).all()
