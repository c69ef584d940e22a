import pytest
import torch
from torch import nn
from torch.nn import functional as F

from revnet.nn import CrossEntropyHead
from tests.helpers import assert_close


def make_head(**options):
    torch.manual_seed(0)
    return CrossEntropyHead(8, 20, **options).double()


def make_batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(20, (2, 5), generator=generator)
    targets[0, 2] = -100
    return x, targets


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_linear_layer_with_cross_entropy(is_chunked, bias):
    head, (x, targets) = make_head(bias=bias, is_chunked=is_chunked), make_batch()
    logits = F.linear(x, head.weight, head.bias)
    assert torch.equal(head(x), logits)
    right = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    parameters = [x, *head.parameters()]
    loss = head(x, targets)
    assert_close(loss, right, tolerance=1e-13)
    gradients = (torch.autograd.grad(value, parameters) for value in (loss, right))
    assert_close(*gradients, tolerance=1e-13)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_one_row(is_chunked):
    head, (x, targets) = make_head(is_chunked=is_chunked), make_batch()
    assert_close(head(x[0, 0], targets[0, 0]), head(x[:1, :1], targets[:1, :1]), tolerance=1e-13)


def test_is_a_linear_layer():
    head = make_head()
    assert list(head.state_dict()) == list(nn.Linear(8, 20).state_dict())
    assert repr(head) == "CrossEntropyHead(in_features=8, out_features=20, bias=True, is_chunked=True)"


def test_is_chunked_by_default_if_the_logits_are_larger_than_the_features():
    assert CrossEntropyHead(8, 9).is_chunked
    assert not CrossEntropyHead(8, 8).is_chunked
    assert not CrossEntropyHead(8, 9, is_chunked=False).is_chunked


@pytest.mark.parametrize("is_chunked", [False, True])
def test_rejects_wrong_inputs(is_chunked):
    head, (x, targets) = make_head(is_chunked=is_chunked), make_batch()
    for changed, message in (
        (torch.full_like(targets, 20), "`targets` must be from 0 to 19, .* range from 20 to 20"),
        (targets[:, :4], r"`targets` has shape \(2, 4\), but must have \(2, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            head(x, changed)
        with pytest.raises(ValueError, match=message):
            torch.func.vmap(lambda x, changed=changed: head(x, changed))(x[None])
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 5, 7\), but must have \(..., 8\)"):
        head(x[..., :7])
    with pytest.raises(TypeError, match=r"`is_chunked` .* must be True or False"):
        CrossEntropyHead(8, 20, is_chunked="auto")
