"""The loss of a language model in chunks: bytes, and the choice of a plan."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from revnet import ReversibleBlock, ReversibleSequential
from revnet.errors import BudgetError
from revnet.memory import MeasuredTiming, max_batch_size, measure, plan, predict
from revnet.models import ReversibleTransformer
from revnet.nn import CrossEntropyHead
from revnet.optim import StepInBackward

VOCABULARY = 1000
OPTIMIZERS = [None, partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW]


def make_model(**options):
    torch.manual_seed(0)
    return ReversibleTransformer(vocab_size=VOCABULARY, dim=32, depth=1, num_heads=2, max_length=64, **options)


def make_tokens(batch=4):
    return torch.randint(VOCABULARY, (batch, 64), generator=torch.Generator().manual_seed(0))


def step_options(tokens):
    return {"kwargs": {"targets": tokens}}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_predicted_bytes_equal_counted_bytes(is_chunked, optimizer, autocast):
    model, tokens = make_model(), make_tokens()
    model.head.is_chunked = is_chunked
    options = {"optimizer": optimizer, "autocast": autocast, **step_options(tokens)}
    predicted, counted = predict(model, tokens, **options), measure(model, tokens, **options)
    assert predicted.peak_bytes == counted.peak_bytes
    assert predicted.activation_bytes == counted.activation_bytes
    assert predicted.at_peak == counted.at_peak


def test_step_in_the_backward_pass_frees_the_gradient_of_the_head():
    model, tokens = make_model(), make_tokens(batch=1)
    options = {"optimizer": torch.optim.AdamW, **step_options(tokens)}
    stepping = predict(model, tokens, step_in_backward=True, **options)
    assert stepping.peak_bytes == measure(model, tokens, step_in_backward=True, **options).peak_bytes
    assert stepping.peak_bytes < predict(model, tokens, **options).peak_bytes


def test_chunks_hold_a_part_of_the_logits():
    tokens = make_tokens()
    x = torch.randn(*tokens.shape, 64, requires_grad=True)
    activations = []
    for is_chunked in (False, True):
        head = CrossEntropyHead(64, VOCABULARY, is_chunked=is_chunked)
        activations.append(measure(head, x, **step_options(tokens)).activation_bytes)
    logits, weight, features = (4 * size for size in (tokens.numel() * VOCABULARY, head.weight.numel(), x.numel()))
    assert activations[0] > 2 * logits
    # The gradient of the weight, a chunk of logits as large, the gradient of `x`, and numbers by row and by class.
    assert 2 * weight + features <= activations[1] <= 2.1 * weight + 2 * features < logits


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="this release of PyTorch has no such loss")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_memory_inside_the_loss_of_pytorch_counts(reduction, autocast):
    tokens = make_tokens()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def forward(self, tokens):
            x, head = self.model.forward_features(tokens).flatten(0, 1), self.model.head
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=128)
            return F.linear_cross_entropy(
                x, head.weight, tokens.flatten(), linear_bias=head.bias, options=options, reduction=reduction
            ).mean()

    model = Whole()
    predicted, counted = (function(model, tokens, autocast=autocast) for function in (predict, measure))
    assert predicted.peak_bytes == counted.peak_bytes
    assert predicted.activation_bytes == counted.activation_bytes >= 128 * VOCABULARY * 4
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is None for gradient in gradients)


def peaks(tokens):
    """Return the peaks with all activations stored, on whole logits and in chunks."""
    model = make_model(policy="store")
    result = []
    for is_chunked in (False, True):
        model.head.is_chunked = is_chunked
        result.append(predict(model, tokens, **step_options(tokens)).peak_bytes)
    return result


def test_plan_chooses_chunks_if_the_budget_demands_it():
    model, tokens = make_model(), make_tokens()
    model.head.is_chunked = False
    whole, chunked = peaks(tokens)
    assert chunked < whole / 2
    options = {"chunked_loss": "auto", "policies": ["store"], **step_options(tokens)}
    ample = plan(model, tokens, budget=whole, **options)
    assert ample.chunked_loss is False
    assert "chunked" not in str(ample)
    tight = plan(model, tokens, budget=chunked, **options)
    assert tight.chunked_loss is True
    assert tight.peak_bytes == chunked
    # Its time is relative to whole logits, which the same estimate takes for faster.
    assert tight.time_ratio > ample.time_ratio == 1
    assert "its logits exist for some rows at a time" in str(tight)
    assert model.head.is_chunked is False, "planning leaves the model as it is"
    tight.apply(model)
    assert model.head.is_chunked is True
    assert measure(model, tokens, **step_options(tokens)).peak_bytes == tight.peak_bytes
    ample.apply(model)
    assert model.head.is_chunked is False


def test_plan_chooses_the_loss_and_the_step_of_the_optimizer():
    model, tokens = make_model(), make_tokens(batch=2)
    options = {"optimizer": torch.optim.AdamW, **step_options(tokens)}
    least = predict(model, tokens, step_in_backward=True, **options).peak_bytes
    choices = {"chunked_loss": "auto", "step_in_backward": "auto", "policies": ["reverse"]}
    both = plan(model, tokens, budget=least, **choices, **options)
    assert (both.chunked_loss, both.step_in_backward) == (True, True)
    both.apply(model)
    StepInBackward(torch.optim.AdamW(model.parameters()))
    model(tokens, targets=tokens).backward()


def test_plan_can_fix_the_loss_or_leave_it():
    model, tokens = make_model(), make_tokens()
    whole, _ = peaks(tokens)
    options = {"budget": whole, "policies": ["store"], **step_options(tokens)}
    assert plan(model, tokens, chunked_loss=True, **options).chunked_loss is True
    left = plan(model, tokens, **options)
    assert left.chunked_loss is None
    model.head.is_chunked = False
    left.apply(model)
    assert model.head.is_chunked is False


def test_measured_times_decide():
    model, tokens = make_model(), make_tokens()
    whole, _ = peaks(tokens)
    options = {"policies": ["store"], "timing": MeasuredTiming(num_rounds=1), **step_options(tokens)}
    timed = plan(model, tokens, budget=whole, chunked_loss="auto", **options)
    assert timed.chunked_loss in (True, False)


def test_error_names_the_loss_as_a_way_out():
    model, tokens = make_model(), make_tokens()
    _, chunked = peaks(tokens)
    message = r"but a loss that works on some rows of logits at a time \(`chunked_loss`\) would make it fit"
    with pytest.raises(BudgetError, match=message):
        plan(model, tokens, budget=chunked, chunked_loss=False, policies=["store"], **step_options(tokens))


def test_largest_batch_follows_the_head():
    model, tokens = make_model(), make_tokens()
    whole, _ = peaks(tokens)
    sizes = []
    for is_chunked in (False, True):
        model.head.is_chunked = is_chunked
        sizes.append(max_batch_size(model, tokens, budget=whole, **step_options(tokens)))
    assert sizes[1] > 2 * sizes[0] >= 2 * len(tokens)


def test_rejects_models_without_a_head():
    model = ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"`model` \(=ReversibleSequential\) has no `revnet.nn.CrossEntropyHead`"):
        plan(model, torch.zeros(1, 4), budget="1GiB", chunked_loss="auto")
    with pytest.raises(ValueError, match=r"`chunked_loss` \(='no'\) must be True, False or 'auto'"):
        plan(make_model(), make_tokens(), budget="1GiB", chunked_loss="no")
