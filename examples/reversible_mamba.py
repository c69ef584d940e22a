# A reversible network of selective state-space layers (Gu and Dao 2023, Mamba, Algorithm 2), in plain PyTorch,
# on selective copying: repeat, in order, the few letters that stood between blanks.
# Run: python examples/reversible_mamba.py
import torch
from torch import nn

import revnet

NUM_LETTERS, NUM_COPIED, LENGTH, DIM, STATE = 6, 4, 24, 32, 8
BLANK, GO = NUM_LETTERS, NUM_LETTERS + 1


class SelectiveLayer(nn.Module):
    """A residual function: convolution, selective scan and gate. It reads only the past."""

    def __init__(self, dim, state):
        super().__init__()
        self.norm, self.project = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim)
        self.conv = nn.Conv1d(dim, dim, 4, padding=3, groups=dim)
        self.select = nn.Linear(dim, dim + 2 * state)
        self.log_decay = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(dim, 1))
        self.skip, self.out = nn.Parameter(torch.ones(dim)), nn.Linear(dim, dim)
        nn.init.constant_(self.select.bias[:dim], -2.0)  # short steps at first: a long memory

    def forward(self, x):
        u, gate = self.project(self.norm(x)).chunk(2, -1)
        u = nn.functional.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        dim, state = self.log_decay.shape
        step, write, read = self.select(u).split((dim, state, state), -1)
        step = nn.functional.softplus(step)[..., None]
        decay = (-step * self.log_decay.exp()).exp()
        inputs = step * write[:, :, None] * u[..., None]
        h, outputs = torch.zeros_like(inputs[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + inputs[:, t]
            outputs.append((h * read[:, t, None]).sum(-1))
        y = torch.stack(outputs, 1) + self.skip * u
        return self.out(y * nn.functional.silu(gate))


class StateSpaceModel(nn.Module):
    """Both streams start as the embedding, and their mean is read at the end."""

    def __init__(self, depth):
        super().__init__()
        blocks = [
            revnet.ReversibleBlock(SelectiveLayer(DIM, STATE), SelectiveLayer(DIM, STATE), split_dim=-1)
            for _ in range(depth)
        ]
        self.embed = nn.Embedding(NUM_LETTERS + 2, DIM)
        self.layers = nn.Sequential(
            revnet.nn.DuplicateStreams(), revnet.ReversibleSequential(*blocks), revnet.nn.JoinStreams("mean")
        )
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, NUM_LETTERS))

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)))


def batch_of(size):
    """Return letters between blanks, then as many marks as letters; and the letters."""
    letters = torch.randint(NUM_LETTERS, (size, NUM_COPIED))
    places = torch.rand(size, LENGTH).argsort(1)[:, :NUM_COPIED].sort(1).values
    tokens = torch.full((size, LENGTH + NUM_COPIED), BLANK).scatter_(1, places, letters)
    tokens[:, LENGTH:] = GO
    return tokens, letters


def main():
    torch.manual_seed(0)
    model = StateSpaceModel(depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for update in range(1, 301):
        tokens, letters = batch_of(64)
        logits = model(tokens)[:, LENGTH:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), letters.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 50 == 0:
            correct = (logits.argmax(-1) == letters).float().mean().item()
            print(f"update {update}: loss {loss.item():.3f}, letters right {correct:.2f}", flush=True)
    for depth in (2, 16):
        model, bytes_of = StateSpaceModel(depth), {}
        for policy in ("reverse", "store"):
            revnet.set_policy(model, policy)
            bytes_of[policy] = revnet.memory.predict(model, tokens).activation_bytes
        print(f"{depth} blocks: {bytes_of['reverse']:,} bytes reversed, {bytes_of['store']:,} stored")


if __name__ == "__main__":
    main()
