# Fine-tune GPT-2 on a text of your own, reversibly. The converted model starts as the original, bit for bit, and its
# coefficients move while it trains. Needs transformers.
# Run: python examples/convert_gpt.py TEXT_FILE
import argparse
from pathlib import Path

import torch
import transformers

import revnet
from revnet.conversion import Dr2Net, set_method


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="gpt2", help="name on the hub, or folder")
    parser.add_argument("--num-updates", type=int, default=200)
    parser.add_argument("--length", type=int, default=256, help="tokens in each row of a batch")
    given = parser.parse_args(arguments)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    model.config.use_cache = False
    tokens = torch.tensor(tokenizer(given.text.read_text())["input_ids"])
    if not given.length < min(len(tokens), model.config.n_positions + 1):
        parser.error(f"--length must be below the {len(tokens)} tokens of the text, and within the model's positions")

    def batch():
        starts = torch.randint(len(tokens) - given.length, (4,))
        return torch.stack([tokens[start : start + given.length] for start in starts])

    torch.manual_seed(0)
    rows = batch()
    loss_of = torch.no_grad()(lambda: model.eval()(rows, labels=rows).loss.item())
    before = loss_of()
    start, end = Dr2Net(1.0, 0.0, fraction_bits=14), Dr2Net(0.75, 0.25, fraction_bits=14)
    revnet.convert(model.transformer.h, start)
    print(f"loss before and after the conversion: {before:.6f}, {loss_of():.6f}")

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for update in range(given.num_updates):
        share = min(1.0, 2 * (update + 1) / given.num_updates)
        set_method(model, start.between(end, share))
        rows = batch()
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update % 20 == 0 or update == given.num_updates - 1:
            print(f"update {update}: loss {loss.item():.3f}, {end.between(start, 1 - share)}", flush=True)
    example = {"input_ids": rows, "labels": rows}
    reversed_bytes = revnet.memory.predict(model, kwargs=example).activation_bytes
    revnet.set_policy(model, "store")
    stored_bytes = revnet.memory.predict(model, kwargs=example).activation_bytes
    print(f"activations of a step: {reversed_bytes:,} bytes reversed, {stored_bytes:,} stored")


if __name__ == "__main__":
    main()
