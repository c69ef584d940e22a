"""A small host that calls residual blocks one after the other, as timm and transformers do."""

import copy

import torch
from torch import nn

import revnet
from revnet.conversion import Consistent, Dr2Net

WIDTH = 16


class Block(nn.Module):
    """A residual block of two branches."""

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(width), nn.Linear(width, width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, scale=None):
        h = self.dropout(self.mixer(self.norm1(x)))
        x = x + (h if scale is None else h * scale)
        return x + self.mlp(self.norm2(x))


class Host(nn.Module):
    """A model with a list of blocks."""

    def __init__(self, num_blocks=5, width=WIDTH, dropout=0.0, block=Block):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList([block(width, dropout) for _ in range(num_blocks)])
        self.head = nn.Linear(width, 3)

    def forward(self, x, scale=None, stop=None):
        x = self.stem(x)
        for block in self.blocks[:stop]:
            x = block(x, scale)
        return self.head(x)


def twins(method, num_blocks=5, dtype=torch.float32, dropout=0.0, **options):
    """Return a converted host, and its stored twin."""
    torch.manual_seed(0)
    host = Host(num_blocks, dropout=dropout).to(dtype)
    stored = copy.deepcopy(host)
    for model in (host, stored):
        revnet.convert(model, method, blocks="blocks", **options)
    revnet.set_policy(stored, "store")
    return host, stored


def gradients(model, run):
    """Return the gradients of all parameters after `run(model)`, which runs the backward pass."""
    model.zero_grad()
    torch.manual_seed(1)
    run(model)
    return [parameter.grad for parameter in model.parameters()]


def all_equal(first, second):
    """Return whether two lists of gradients are equal bit for bit."""
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )


def reference(host, method, x, scale=None, stop=None):
    """Compute the two-step scheme of a method with the blocks of an unconverted host."""
    a, b, c = factors_of(method)
    old = new = host.stem(x)
    for block in host.blocks[:stop]:
        old, new = new, a * old + c * new + b * (block(new, scale) - new)
    return host.head(new)


def factors_of(method):
    """Return `a`, `b` and `c` of the equation in the docstring of a method."""
    if isinstance(method, Dr2Net):
        return method.beta, 1, method.alpha
    return (method.a, 1 + method.a, 1 - method.a) if isinstance(method, Consistent) else (1, 1, 0)
