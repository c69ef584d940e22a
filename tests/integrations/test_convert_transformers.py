"""Language models of transformers, converted in place."""

import copy

import pytest
import torch

import revnet
from revnet.conversion import BDIA, Consistent, ConversionSchedule, Dr2Net, Rewire
from revnet.memory import measure, predict

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def _gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=4, n_embd=32, n_head=4, vocab_size=97, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).train()


def _llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, attention_dropout=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


CASES = {
    "gpt2": (_gpt2, "transformer.h", ["ln_1 attn", "ln_2 mlp"]),
    "llama": (_llama, "model.layers", ["input_layernorm self_attn", "post_attention_layernorm mlp"]),
}


def _arguments():
    mask = torch.ones_like(TOKENS)
    mask[0, 9:] = 0
    return {"input_ids": TOKENS, "labels": TOKENS, "attention_mask": mask, "use_cache": False}


def _step(model):
    model.zero_grad()
    torch.manual_seed(1)
    output = model(**_arguments())
    output.loss.backward()
    return [output.logits.detach(), *[parameter.grad for parameter in model.parameters()]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("has_branches", [False, True])
def test_language_model(case, has_branches):
    make, blocks, names = CASES[case]
    model, branches = make(), names if has_branches else None
    converted = copy.deepcopy(model)
    report = revnet.convert(converted, Dr2Net(), blocks=blocks, branches=branches)
    assert len(report.converted) == 4
    assert all(map(torch.equal, _step(converted), _step(model)))
    for method in (Consistent(), BDIA()):
        converted = copy.deepcopy(model)
        revnet.convert(converted, method, blocks=blocks, branches=branches)
        stored = copy.deepcopy(converted)
        revnet.set_policy(stored, "store")
        assert all(map(torch.equal, _step(converted), _step(stored)))
    options = {"kwargs": _arguments(), "loss": lambda output: output.loss}
    assert predict(converted, **options) == measure(converted, **options)


def test_bfloat16_model_by_branches():
    model = _llama().bfloat16()
    revnet.convert(model, Consistent(), blocks="model.layers", branches=CASES["llama"][2])
    stored = copy.deepcopy(model)
    revnet.set_policy(stored, "store")
    assert all(map(torch.equal, _step(model), _step(stored)))


def test_cache_is_for_generation_only():
    model = _gpt2()
    revnet.convert(model, Consistent(), blocks="transformer.h")
    with pytest.raises(ValueError, match=r"`transformer\.h\.0` is given a DynamicCache.*use_cache=False"):
        model(TOKENS, use_cache=True)
    model.eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(TOKENS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


def test_own_checkpointing_is_refused():
    model = _gpt2()
    revnet.convert(model, Rewire(), blocks="transformer.h")
    # transformers renames it in 5.24.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    with pytest.raises(ValueError, match=r"`transformer\.h\.0` has its own checkpointing on"):
        _step(model)
    revnet.convert(model, back=True)
    with pytest.raises(ValueError, match=r"has `.*_checkpointing` on, so it would run"):
        revnet.convert(model, Rewire(), blocks="transformer.h")


def _method(model):
    return model.transformer.h[0]._conversion_place.row.method


def test_callback_sets_the_method_of_the_weights():
    """Of the update from which a run resumes, of the last one, or of the best one, if that is loaded."""
    pytest.importorskip("accelerate")
    from revnet.transformers import ConversionCallback

    model = _gpt2()
    schedule = ConversionSchedule(Consistent(0), Consistent(0.5), num_updates=10)
    revnet.convert(model, schedule.start, blocks="transformer.h")
    callback, control = ConversionCallback(schedule), transformers.TrainerControl()
    state = transformers.TrainerState(global_step=4)
    callback.on_train_begin(transformers.TrainingArguments(use_cpu=True), state, control, model=model)
    assert _method(model).a == 0.2
    state.global_step = 10
    callback.on_train_end(transformers.TrainingArguments(use_cpu=True), state, control, model=model)
    assert _method(model).a == 0.5
    state.best_global_step = 6
    arguments = transformers.TrainingArguments(
        use_cpu=True, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2
    )
    callback.on_train_end(arguments, state, control, model=model)
    assert _method(model).a == 0.3


@pytest.mark.slow
def test_trainer_callback_follows_the_schedule(tmp_path):
    pytest.importorskip("accelerate")
    from revnet.transformers import ConversionCallback, DriftCallback

    model = _gpt2()
    schedule = ConversionSchedule(Consistent(0, None), Consistent(0.5, None), num_updates=2)
    revnet.convert(model, schedule.start, blocks="transformer.h")
    seen, after = [], []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(_method(kwargs["model"]).a)

        def on_step_end(self, args, state, control, **kwargs):
            after.append(_method(kwargs["model"]).a)

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    drift = DriftCallback(1)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=[ConversionCallback(schedule), Watch(), drift]
    )
    trainer.train()
    assert seen == [0.0, 0.25, 0.5, 0.5]
    assert after == [0.25, 0.5, 0.5, 0.5]
    assert list(drift.measured) == [1, 2, 3]  # Before, nothing is rebuilt.
    for measured in drift.measured.values():
        assert [block.name for block in measured.blocks] == [f"transformer.h.{index}" for index in range(4)]
        assert all(0 < block.error < 1e-4 for block in measured.blocks)
    with pytest.raises(TypeError, match=r"`schedule` \(=1\) must be a `ConversionSchedule`"):
        ConversionCallback(1)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning", "ignore:.*does not have many workers")
def test_lightning_callback_follows_the_schedule(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from revnet.lightning import ConversionCallback
    from tests.conversion.hosts import Host

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.host, self.seen = Host(3), []

        def training_step(self, batch, _):
            self.seen.append(self.host.blocks[0]._conversion_place.row.method.a)
            return self.host(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    schedule = ConversionSchedule(Consistent(0), Consistent(0.5), num_updates=2)
    revnet.convert(module.host.blocks, schedule.start)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[ConversionCallback(schedule)],
        accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=2))
    assert module.seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(TypeError, match=r"`schedule` \(=1\) must be a `ConversionSchedule`"):
        ConversionCallback(1)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning", "ignore:.*does not have many workers")
def test_lightning_callback_sets_the_method_of_the_weights(tmp_path):
    """In validation, after training, and for weights from a checkpoint."""
    lightning = pytest.importorskip("lightning.pytorch")
    from revnet.lightning import ConversionCallback
    from tests.conversion.hosts import Host

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.host, self.seen = Host(3), []
            revnet.convert(self.host.blocks, Consistent(0))

        def method(self):
            return self.host.blocks[0]._conversion_place.row.method.a

        def training_step(self, batch, _):
            return self.host(batch).square().mean()

        def validation_step(self, batch, _):
            self.seen.append(self.method())
            return self.host(batch).mean()

        test_step = predict_step = validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def make_trainer(**options):
        schedule = ConversionSchedule(Consistent(0), Consistent(0.5), num_updates=4)
        saving = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        return lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=[ConversionCallback(schedule), saving], **options,
        )  # fmt: skip

    batches = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2)
    one = torch.utils.data.DataLoader(torch.randn(2, 4), batch_size=2)
    module, trainer = Module(), make_trainer(max_epochs=1, val_check_interval=1)
    trainer.fit(module, batches, one)
    # Of the sanity check, and after each update.
    assert module.seen == [0, 0.125, 0.25, 0.375, 0.5]
    assert module.method() == 0.5
    trainer.test(module, one, ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert module.seen[-1] == 0.25

    module, trainer = Module(), make_trainer()
    trainer.validate(module, one, verbose=False)
    assert module.seen == [0], "without a checkpoint, the callback does not know the weights"
    trainer.predict(module, one, ckpt_path=tmp_path / "step=4.ckpt")
    assert module.seen == [0, 0.5]
