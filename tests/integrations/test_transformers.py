"""The language model in transformers: loss, padding, generation, files, Trainer and accelerate."""

import importlib
import math
import sys

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

from revnet import FixedPoint, MissingDependencyError, Offload, Reverse, Store  # noqa: E402
from revnet.memory import plan, predict  # noqa: E402
from revnet.models import ReversibleTransformer  # noqa: E402
from revnet.training import LanguageConfig, load_language_model, train  # noqa: E402
from revnet.transformers import (  # noqa: E402
    DriftCallback,
    ReversibleTransformerConfig,
    ReversibleTransformerForCausalLM,
)

# Notes of transformers and accelerate about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
VOCAB = 50
ATTENTIONS = ("full", "lsh", "hierarchical")
ALL_NONE = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def make_model(**options):
    torch.manual_seed(0)
    config = ReversibleTransformerConfig(
        **{"vocab_size": VOCAB, "dim": 16, "depth": 3, "num_heads": 2, "max_position_embeddings": 64, **options}
    )
    return AutoModelForCausalLM.from_config(config)


def make_tokens(rows=2, length=12, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def equal_weights(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_auto_classes_find_the_model():
    model = make_model()
    assert type(model) is ReversibleTransformerForCausalLM
    assert model.transformer.blocks.policies == (Reverse(),) * 3
    assert type(AutoConfig.for_model("reversible_transformer", depth=1)) is ReversibleTransformerConfig
    assert model.config.hidden_size == 16
    assert model.config.num_hidden_layers == 3


def test_initial_weights_have_the_deviations_of_the_transformer():
    own, other = make_model(dim=64, vocab_size=500), ReversibleTransformer(vocab_size=500, dim=64, depth=3, num_heads=2)
    for (name, p), q in zip(own.transformer.named_parameters(), other.parameters(), strict=True):
        assert float(p.detach().square().mean()) == pytest.approx(float(q.detach().square().mean()), rel=0.1), name


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_loss_is_of_the_next_tokens(is_chunked, num_items):
    model, tokens = make_model(chunked_loss=is_chunked).double(), make_tokens()
    labels = tokens.clone()
    labels[0, :5] = -100
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    output = model(tokens, labels=labels, **options)
    logits = model.transformer(tokens)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="mean" if num_items is None else "sum")
    expected = expected if num_items is None else expected / 7
    # transformers computes the loss in float32.
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-14 if is_chunked else 1e-6, atol=0)
    assert (output.logits is None) == is_chunked
    assert model.eval()(tokens, labels=labels).logits is not None


def test_tuple_output_and_kept_logits():
    model, tokens = make_model().eval(), make_tokens()
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    assert loss.dim() == 0
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:])


def pad(tokens, lengths, side, to):
    """Return the rows with padding, their mask, and the slice of each row that is real."""
    rows = torch.zeros(len(lengths), to, dtype=torch.int64)
    slices = [slice(to - n, to) if side == "left" else slice(0, n) for n in lengths]
    for row, place, length in zip(range(len(lengths)), slices, lengths, strict=True):
        rows[row, place] = tokens[row, :length]
    mask = torch.zeros_like(rows)
    for row, place in enumerate(slices):
        mask[row, place] = 1
    return rows, mask, slices


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_tokens(attention, side):
    model = make_model(attention=attention, bucket_size=8, block_size=4, coupling="additive").double().eval()
    tokens, lengths = make_tokens(rows=3, length=40), (40, 23, 1)
    rows, mask, slices = pad(tokens, lengths, side, to=44)
    padded = model(rows, attention_mask=mask).logits
    for row, place in enumerate(slices):
        alone = model(tokens[row : row + 1, : lengths[row]]).logits[0]
        bound = 100 * torch.finfo(torch.float64).eps * float(alone.detach().abs().max())
        assert float((padded[row, place] - alone).detach().abs().max()) <= bound


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch_equal_the_ones_of_its_rows(side):
    model, tokens, lengths = make_model().double(), make_tokens(), (12, 7)
    rows, mask, _ = pad(tokens, lengths, side, to=15)
    labels = rows.masked_fill(mask == 0, -100)
    model(rows, attention_mask=mask, labels=labels, num_items_in_batch=1).loss.backward()
    padded = [p.grad for p in model.parameters()]
    model.zero_grad()
    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1, :length]
        model(alone, labels=alone, num_items_in_batch=1).loss.backward()
    for p, grad in zip(model.parameters(), padded, strict=True):
        # transformers computes the loss in float32.
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-5 * float(p.grad.abs().max()))


def test_embeddings_as_inputs():
    model, tokens = make_model().eval(), make_tokens()
    rows, mask, _ = pad(tokens, (12, 5), "left", to=14)
    embeds = model.get_input_embeddings()(rows)
    expected = model(rows, attention_mask=mask).logits
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)


def test_positions_may_have_an_offset():
    model, tokens = make_model().eval(), make_tokens()
    logits = model(tokens).logits
    assert torch.equal(model(tokens, position_ids=torch.arange(5, 17)[None]).logits, logits)
    rows, mask, _ = pad(tokens, (12, 5), "left", to=14)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(rows, attention_mask=mask).logits
    assert torch.equal(model(rows, attention_mask=mask, position_ids=positions).logits, expected)


def greedy(model, tokens, num_new):
    for _ in range(num_new):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_generate_is_repeated_argmax(use_cache):
    model, tokens = make_model().eval(), make_tokens()
    options = {} if use_cache is None else {"use_cache": use_cache}
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(generated, greedy(model, tokens, 6))
    assert torch.equal(generated, model.transformer.generate(tokens, 6, temperature=0))


def test_generate_from_prompts_of_several_lengths():
    model, tokens = make_model().eval(), make_tokens()
    rows, mask, _ = pad(tokens, (12, 5), "left", to=14)
    generated = model.generate(rows, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, length in enumerate((12, 5)):
        assert torch.equal(generated[row, 14:], greedy(model, tokens[row : row + 1, :length], 6)[0, length:])
    embeds = model.get_input_embeddings()(rows)
    of_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(of_embeds, generated[:, 14:])
    assert model.generate(tokens, max_new_tokens=4, num_beams=3, do_sample=True).shape == (2, 16)


@pytest.mark.parametrize("is_tied", [False, True])
def test_files_keep_weights_and_outputs(tmp_path, is_tied):
    model, tokens = make_model(tie_word_embeddings=is_tied, coupling="fixed_point").eval(), make_tokens()
    model.resize_token_embeddings(VOCAB + 3)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    assert model.transformer.vocab_size == model.config.vocab_size == VOCAB + 3
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info == ALL_NONE
    assert equal_weights(model, loaded)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == is_tied
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.transformer.blocks[0].coupling == FixedPoint()
    loaded.resize_token_embeddings(VOCAB - 10)
    assert loaded(tokens % 40).logits.shape == (2, 12, VOCAB - 10)


def test_tied_head_is_the_embedding_for_each_stream():
    model, tokens = make_model(tie_word_embeddings=True).double().eval(), make_tokens()
    weight = model.get_input_embeddings().weight
    features = model.transformer.forward_features(tokens)
    expected = F.linear(features, torch.cat((weight, weight), dim=1), model.get_output_embeddings().bias)
    torch.testing.assert_close(model(tokens).logits, expected)
    chunked = make_model(tie_word_embeddings=True, chunked_loss=True).double()
    losses = [m.train()(tokens, labels=tokens).loss.double() for m in (model, chunked)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_switches_of_checkpointing_set_policies():
    model = make_model()
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert model.transformer.blocks.policies == (Store(),) * 3
    assert not model.is_activation_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.transformer.blocks.policies == (Reverse(),) * 3
    model.activation_checkpointing_enable(every_n_layers=2)
    assert model.transformer.blocks.policies == (Reverse(), Store(), Reverse())
    model.activation_checkpointing_enable({"offload": True})
    assert model.transformer.blocks.policies == (Offload(),) * 3
    with pytest.raises(ValueError, match="has 'reentrant', which is not an option"):
        model.gradient_checkpointing_enable({"reentrant": False})
    with pytest.raises(ValueError, match=r"`every_n_layers` \(=0\)"):
        model.activation_checkpointing_enable(every_n_layers=0)


def test_a_plan_fits_the_model():
    model, tokens = make_model(), make_tokens(rows=4, length=30)
    options = {"kwargs": {"labels": tokens}, "loss": lambda output: output.loss}
    stored = predict(make_model(policy="store"), tokens, **options).peak_bytes
    chosen = plan(model, tokens, budget=stored - 1, **options)
    chosen.apply(model)
    assert predict(model, tokens, **options).peak_bytes == chosen.peak_bytes < stored
    assert model.is_activation_checkpointing


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_wraps_an_existing_transformer(attention):
    original = ReversibleTransformer(
        vocab_size=VOCAB, dim=12, depth=2, num_heads=2, attention=attention, bucket_size=8, block_size=4, ff_mult=8 / 3
    ).eval()
    wrapped = ReversibleTransformerForCausalLM.from_transformer(original)
    assert wrapped.transformer is original
    assert not wrapped.training
    again = AutoModelForCausalLM.from_config(wrapped.config).eval()
    again.load_state_dict(wrapped.state_dict())
    tokens = make_tokens(length=30)
    assert torch.equal(again(tokens).logits, original(tokens))
    assert torch.equal(wrapped(tokens).logits, original(tokens))


def test_exchanges_models_with_a_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    config = LanguageConfig(
        data=str(text),
        dim=16,
        depth=2,
        num_heads=2,
        length=16,
        epochs=1,
        updates_per_epoch=2,
        out_dir=str(tmp_path / "run"),
    )
    train(config, quiet=True)
    original = load_language_model(tmp_path / "run")
    model = ReversibleTransformerForCausalLM.from_run(tmp_path / "run")
    tokens = original.vocabulary.encode("the quick", "prompt")[None]
    assert torch.equal(model(tokens).logits, original(tokens))
    model.save_pretrained(tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    loaded.save_weights(tmp_path / "weights.safetensors")
    back = load_language_model(tmp_path / "weights.safetensors")
    assert equal_weights(back, original)
    assert back.header.characters == original.header.characters
    assert torch.equal(back(tokens), original(tokens))
    with pytest.raises(ValueError, match=r"`config.characters` \(=None\) must have one character"):
        make_model().save_weights(tmp_path / "other.safetensors")


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens with right padding."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        tokens, length = make_tokens(1, 12, seed=index)[0], 12 - index % 5
        mask = (torch.arange(12) < length).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def run_trainer(folder, policy, *, resume=None, callbacks=(), model_options=None, **options):
    model = make_model(**{"policy": policy, "dropout": 0.1, "coupling": "fixed_point", **(model_options or {})})
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"model_options": {"chunked_loss": True, "tie_word_embeddings": True}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["float32", "bf16", "chunked and tied", "switch"],
)
def test_trainer_has_the_losses_of_the_stored_twin(tmp_path, options):
    model, losses, trainer = run_trainer(tmp_path / "reverse", "reverse", **options)
    stored_options = {name: value for name, value in options.items() if "checkpointing" not in name}
    twin, stored, _ = run_trainer(tmp_path / "store", "store", **stored_options)
    assert losses == stored
    assert equal_weights(model, twin)
    assert trainer.model_accepts_loss_kwargs
    resumed, later, _ = run_trainer(
        tmp_path / "reverse", "reverse", resume=tmp_path / "reverse" / "checkpoint-2", **options
    )
    assert later[-2:] == losses[-2:]
    assert equal_weights(model, resumed)


def test_additive_coupling_differs_by_rounding(tmp_path):
    options = {"coupling": "additive", "dropout": 0.0}
    _, losses, _ = run_trainer(tmp_path / "reverse", "reverse", model_options=options)
    _, stored, _ = run_trainer(tmp_path / "store", "store", model_options=options)
    # How far rounding alone moves these losses: the same run with its residuals in chunks.
    _, other, _ = run_trainer(tmp_path / "other", "store", model_options={**options, "ff_chunks": 3})
    rounding = max(abs(a - b) for a, b in zip(stored, other, strict=True))
    assert max(abs(a - b) for a, b in zip(losses, stored, strict=True)) <= 100 * max(rounding, 2**-23 * max(stored))


def test_trainer_evaluates_and_logs_drift(tmp_path):
    callback = DriftCallback(2)
    model, _, trainer = run_trainer(
        tmp_path / "watched", "reverse", callbacks=[callback], model_options={"coupling": "additive"}
    )
    assert list(callback.measured) == [0, 2]
    assert all(0 < drift.error < 1e-5 for drift in callback.measured.values())
    assert trainer.state.log_history[0]["drift"] == callback.measured[0].error
    assert trainer.state.log_history[0]["peak_bytes"] > 0
    plain, _, _ = run_trainer(tmp_path / "plain", "reverse", model_options={"coupling": "additive"})
    assert equal_weights(model, plain)
    metrics = trainer.evaluate(Rows())
    assert math.isfinite(metrics["eval_loss"])
    with pytest.raises(ValueError, match=r"`every` \(=0\)"):
        DriftCallback(0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_has_the_losses_of_the_stored_twin(precision):
    AcceleratorState._reset_state(reset_partial_state=True)

    def run(policy):
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = make_model(policy=policy, coupling="fixed_point")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses, accelerator.unwrap_model(model)

    (losses, model), (stored, twin) = run("reverse"), run("store")
    assert losses == stored
    assert equal_weights(model, twin)


def test_peft_adapters_have_the_gradients_of_the_stored_twin():
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def gradients(policy):
        model = make_model(policy=policy, coupling="fixed_point")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["qkv", "project"]))
        model(input_ids=make_tokens(), labels=make_tokens()).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    pairs = list(zip(gradients("reverse"), gradients("store"), strict=True))
    assert len(pairs) == 3 * 2 * 2
    assert all(torch.equal(a, b) for a, b in pairs)


TOKENS = make_tokens()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either `input_ids` or `inputs_embeds`"),
        ({"input_ids": TOKENS[0]}, ValueError, r"`input_ids` has shape \(12,\)"),
        ({"input_ids": TOKENS.repeat(1, 6)}, ValueError, "has 72 positions, more than"),
        ({"input_ids": TOKENS, "labels": TOKENS + 50}, ValueError, "`labels` must be from 0 to 49, or -100"),
        ({"input_ids": TOKENS, "labels": TOKENS, "logits_to_keep": 1}, ValueError, "`logits_to_keep` must be left out"),
        ({"input_ids": TOKENS, "labels": TOKENS[:, 1:]}, ValueError, r"`labels` has shape \(2, 11\)"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS[:, 1:]}, ValueError, r"`attention_mask` has shape \(2, 11\)"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS + 1}, ValueError, "other values than 0 and 1"),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 1, 12, 12)}, NotImplementedError, "than padding"),
        ({"input_ids": TOKENS, "position_ids": torch.arange(12)[None] % 6}, NotImplementedError, "packed into one row"),
        ({"input_ids": TOKENS, "position_ids": torch.arange(12)}, ValueError, r"`position_ids` has shape \(12,\)"),
        ({"input_ids": TOKENS, "past_key_values": ()}, TypeError, "must be a `DynamicCache` of transformers"),
        ({"input_ids": TOKENS, "output_hidden_states": True}, NotImplementedError, "`output_hidden_states`"),
        ({"input_ids": TOKENS, "token_type_ids": TOKENS}, TypeError, "`token_type_ids` is not an argument"),
    ],
)
def test_refuses_what_it_cannot_compute(arguments, error, message):
    with pytest.raises(error, match=message):
        make_model()(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 15}, r"`dim` \(=15\)"),
        ({"attention": "flash"}, r"`attention` \(='flash'\)"),
        ({"policy": "keep"}, r"`policy` \(='keep'\)"),
        ({"coupling": "affine"}, r"`coupling` \(='affine'\)"),
        ({"max_position_embeddings": 0}, r"`max_position_embeddings` \(=0\)"),
    ],
)
def test_refuses_a_wrong_config(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_refuses_to_wrap_another_network():
    with pytest.raises(TypeError, match=r"`model` \(=Linear\) must be a `ReversibleTransformer`"):
        ReversibleTransformerForCausalLM.from_transformer(torch.nn.Linear(2, 2))
    encoder = ReversibleTransformer(vocab_size=9, dim=4, depth=1, num_heads=1, is_causal=False)
    with pytest.raises(ValueError, match="is an encoder"):
        ReversibleTransformerForCausalLM.from_transformer(encoder)
    wide = ReversibleTransformer(vocab_size=9, dim=4, depth=1, num_heads=1, coupling=FixedPoint(12))
    with pytest.raises(ValueError, match="has the coupling FixedPoint"):
        ReversibleTransformerForCausalLM.from_transformer(wide)


def test_import_without_the_library_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("revnet.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"needs transformers 5 or newer.*pip install"):
        importlib.import_module("revnet.transformers")
