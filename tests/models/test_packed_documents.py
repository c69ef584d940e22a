"""A batch of packed documents computes what separate documents compute."""

import pytest
import torch

from revnet.coupling import Additive, FixedPoint
from revnet.functional import _full_attention
from revnet.memory import measure, predict
from revnet.models import ReversibleTransformer

LENGTHS = (5, 9, 1, 7)
POLICIES = ("reverse", "store", "checkpoint")


@pytest.fixture(params=[1024, 8], ids=["whole", "by rows"], autouse=True)
def _rows(request, monkeypatch):
    """The mask exists as a whole, or for eight queries at a time."""
    monkeypatch.setattr(_full_attention, "_MOST_ROWS", request.param)


def make(policy, coupling=None):
    torch.manual_seed(0)
    options = {"vocab_size": 11, "dim": 16, "depth": 3, "num_heads": 2, "max_length": 64}
    return ReversibleTransformer(**options, coupling=coupling or Additive(), policy=policy)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def make_documents(dtype=torch.int64):
    torch.manual_seed(1)
    end = torch.zeros(1, dtype=torch.int64)
    documents = [torch.cat((end, torch.randint(1, 11, (length,)), end)) for length in LENGTHS]
    packed = torch.cat([*(document[:-1] for document in documents), end])[None]
    mask = (packed[:, :-1] == 0).cumsum(-1).to(dtype)  # 0 begins a document
    return documents, packed[:, :-1], packed[:, 1:], mask


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_gradients_equal_separate_documents(policy):
    model = make(policy).double()
    documents, tokens, targets, mask = make_documents()
    packed = model(tokens, mask, targets=targets)
    losses = [model(document[None, :-1], targets=document[None, 1:]) * (len(document) - 1) for document in documents]
    separate = sum(losses) / tokens.numel()
    torch.testing.assert_close(packed, separate, rtol=1e-14, atol=0)
    found = gradients(model, packed)
    for first, second in zip(found, gradients(model, separate), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-14)
    joined = gradients(model, model(tokens, targets=targets))
    assert max((first - second).abs().max() for first, second in zip(found, joined, strict=True)) > 1e-4


@pytest.mark.parametrize("coupling", [Additive(), FixedPoint()], ids=["additive", "fixed point"])
def test_rebuilt_gradients_equal_stored_ones(coupling):
    _, tokens, targets, mask = make_documents(torch.int32)
    results = []
    for policy in POLICIES:
        model = make(policy, coupling)
        results.append(gradients(model, model(tokens, mask, targets=targets)))
    for reversed_, stored, checkpointed in zip(*results, strict=True):
        assert torch.equal(stored, checkpointed)
        if coupling == FixedPoint():
            assert torch.equal(reversed_, stored)
        torch.testing.assert_close(reversed_, stored, rtol=1e-4, atol=1e-7)


def test_padding_is_seen_by_no_token():
    model = make("reverse").double().eval()
    _, tokens, _, mask = make_documents()
    padded, padded_mask = torch.cat((tokens, tokens), 1), torch.cat((torch.zeros_like(mask), mask), 1)
    torch.testing.assert_close(
        model(padded, padded_mask)[:, tokens.shape[1] :], model(tokens, mask), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_predicted(policy):
    _, tokens, targets, mask = make_documents()
    arguments = {"kwargs": {"targets": targets, "mask": mask}}
    predicted, measured = (count(make(policy), tokens, **arguments).activation_bytes for count in (predict, measure))
    assert predicted == measured


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_in_rows_equals_the_whole(is_causal, monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 37, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.randint(0, 4, (2, 37)).sort(-1).values  # 0 is padding
    results = []
    for rows in (8, 1024):
        monkeypatch.setattr(_full_attention, "_MOST_ROWS", rows)
        y = _full_attention.full_attention(*inputs, is_causal=is_causal, mask=mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for by_rows, whole in zip(*results, strict=True):
        torch.testing.assert_close(by_rows, whole, rtol=0, atol=1e-13)


def test_rows_are_computed_again_under_the_same_autocast(monkeypatch):
    _, tokens, targets, mask = make_documents()
    found = []
    for rows in (8, 1024):
        monkeypatch.setattr(_full_attention, "_MOST_ROWS", rows)
        model = make("store")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, mask, targets=targets)
        found.append(gradients(model, loss))
    for by_rows, whole in zip(*found, strict=True):
        torch.testing.assert_close(by_rows, whole, rtol=0.05, atol=2e-3)  # bfloat16 has 8 bits
