"""Budgets for models of transformers, which are used as they are."""

import copy

import pytest
import torch

from revnet import Checkpoint, PredictionError, apply_budget
from revnet.memory import measure, predict

transformers = pytest.importorskip("transformers")


def _loss(output):
    return output.loss


def _gpt2(**options):
    config = transformers.GPT2Config(
        n_layer=4, n_embd=32, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config).train()


def _arguments(*, num_padded):
    tokens = torch.randint(1, 100, (3, 48))
    mask = torch.ones_like(tokens)
    mask[0, 48 - num_padded :] = 0
    return {"input_ids": tokens, "labels": tokens, "attention_mask": mask, "use_cache": False}


def _gradients(model, kwargs):
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    model(**kwargs).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_budget_is_met_to_the_byte():
    model, kwargs = _gpt2(), _arguments(num_padded=5)
    step = {"kwargs": kwargs, "loss": _loss}
    expected, plain = _gradients(model, kwargs), predict(model, **step)
    least = apply_budget(model, budget=plain.peak_bytes, **step).points[0].peak_bytes
    chosen = apply_budget(model, budget=(least + plain.peak_bytes) // 2, **step)
    assert [unit.name for unit in chosen.units] == [f"transformer.h.{index}" for index in range(4)]
    assert Checkpoint() in {unit.policy for unit in chosen.units}
    assert chosen.memory == measure(model, **step)
    assert chosen.peak_bytes < plain.peak_bytes
    for actual, wanted in zip(_gradients(model, kwargs), expected, strict=True):
        assert torch.equal(actual, wanted)
    ids = model.generate(kwargs["input_ids"][:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert ids.shape == (3, 8)


def test_budget_holds_without_padding():
    # transformers looks for padding, which it cannot see in a prediction. Then it makes a mask that a step without
    # padding does not need: one byte for each pair of tokens.
    model, kwargs = _gpt2(), _arguments(num_padded=0)
    chosen = apply_budget(model, budget="1GiB", kwargs=kwargs, loss=_loss)
    peak = measure(model, kwargs=kwargs, loss=_loss).peak_bytes
    assert 0 <= chosen.peak_bytes - peak <= 3 * 48 * 48


def test_cache_is_rejected():
    with pytest.raises(PredictionError, match=r"`transformer\.h\.0` is given a DynamicCache.*`use_cache=False`"):
        apply_budget(_gpt2(), budget="1GiB", kwargs={"input_ids": torch.zeros(2, 8, dtype=torch.long)})


def test_own_switch_must_be_off():
    model, kwargs = _gpt2(), _arguments(num_padded=5)
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # The second is older.
    getattr(model, f"{name}_checkpointing_enable")()
    with pytest.raises(ValueError, match=rf"`gradient_checkpointing` .* `model\.{name}_checkpointing_disable\(\)`"):
        apply_budget(model, budget="1GiB", kwargs=kwargs, loss=_loss)
    getattr(model, f"{name}_checkpointing_disable")()
    apply_budget(model, budget="1GiB", kwargs=kwargs, loss=_loss)
