# transformers' Trainer. `activation_checkpointing` reverses the blocks, and without it they are stored:
# the same losses, fewer bytes of activations. Run: python examples/transformers_trainer.py
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from revnet.memory import predict
from revnet.transformers import ReversibleTransformerConfig

config = ReversibleTransformerConfig(
    vocab_size=64, dim=32, depth=8, num_heads=2, policy="store", coupling="fixed_point"
)
options = {"max_steps": 4, "logging_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}

for policy in ("reverse", "store"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (32, 33))]
    arguments = TrainingArguments(**options, activation_checkpointing=policy == "reverse")
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tokens = torch.randint(64, (8, 33))
    memory = predict(model, tokens, kwargs={"labels": tokens}, loss=lambda output: output.loss)
    print(f"{policy}: {memory.activation_bytes:,} bytes, losses", *losses)
