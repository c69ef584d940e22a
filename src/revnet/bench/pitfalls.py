"""Situations in which reversible code often goes wrong, each with three tiny blocks.

A pitfall runs once under plain autograd and once with a method, from the same weights, input and random state, and
returns what it observes: gradients, buffers or the random state. Both observations must be equal. To add a pitfall, add
an entry to `PITFALLS`.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revnet.bench.cases import FunctionPair
from revnet.bench.methods import PLAIN, Method

_DEPTH = 3
_SPLIT_DIM = 2  # the only dimension that all methods can split

Observation = Sequence[Tensor | None]


class PitfallSubject:
    """Blocks that run with one method, as a pitfall uses them."""

    def __init__(self, method: Method, functions: Sequence[FunctionPair], x: Tensor):
        self.functions = copy.deepcopy([function for pair in functions for function in pair])
        pairs = list(zip(self.functions[0::2], self.functions[1::2], strict=True))
        self.module: Callable[..., Tensor] = method.make(pairs, _SPLIT_DIM)
        self.parameters = [parameter for function in self.functions for parameter in function.parameters()]
        self._x = x
        self._weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def input(self, *, requires_grad: bool = True) -> Tensor:
        """Return a new copy of the input, because memcnn overwrites its input."""
        return self._x.clone().requires_grad_(requires_grad)

    def run(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the output for a clone of `x`, which represents the output of a stem."""
        return self.module(x.clone(), **kwargs)

    def loss(self, y: Tensor) -> Tensor:
        """Return a loss that stores no activation."""
        return (y * self._weights).sum()

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of all parameters."""
        return [parameter.grad for parameter in self.parameters]

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class _Linear(nn.Module):
    """Linear, tanh, linear: smooth, with optional arguments, and with an error on demand."""

    def __init__(self, num_features: int = 3):
        super().__init__()
        self.linear1 = nn.Linear(num_features, num_features)
        self.linear2 = nn.Linear(num_features, num_features)
        self.fails = False

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if self.fails:
            raise ArithmeticError("on demand")
        hidden = self.linear1(x)
        if context is not None:
            hidden = hidden + context
        if mask is not None:
            hidden = hidden.masked_fill(mask, 0)
        return self.linear2(hidden.tanh())


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(5), _Linear())


def _dropout() -> nn.Module:
    return nn.Sequential(_Linear(), nn.Dropout(0.3))


def _both() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(5), _Linear(), nn.Dropout(0.3))


def _wide() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def _seed() -> None:
    random.seed(1)  # revtorch draws its seeds from it
    torch.manual_seed(1)


def _buffers(subject: PitfallSubject) -> Observation:
    subject.loss(subject.run(subject.input())).backward()
    return [buffer for function in subject.functions for buffer in function.buffers()]


def _slope_ratio(subject: PitfallSubject, loss: Callable[[], Tensor]) -> Observation:
    """Return the directional derivative from the gradients divided by a finite difference.

    This does not depend on which random numbers a method draws.
    """
    directions = [torch.ones_like(parameter) for parameter in subject.parameters]
    _seed()
    loss().backward()
    slope = sum(
        (direction * grad).sum()
        for direction, grad in zip(directions, subject.gradients(), strict=True)
        if grad is not None
    )
    values = []
    step = 1e-5
    with torch.no_grad():
        for factor in (step, -2 * step):
            for parameter, direction in zip(subject.parameters, directions, strict=True):
                parameter.add_(direction, alpha=factor)
            _seed()
            values.append(loss())
    return [torch.as_tensor(slope) * 2 * step / (values[0] - values[1])]


def _dropout_gradient(subject: PitfallSubject) -> Observation:
    return _slope_ratio(subject, lambda: subject.loss(subject.run(subject.input())))


def _dropout_twice(subject: PitfallSubject) -> Observation:
    def loss() -> Tensor:
        first, second = (subject.run(subject.input()) for _ in range(2))
        return subject.loss(first) + 2 * subject.loss(second).square()

    return _slope_ratio(subject, loss)


def _random_state(subject: PitfallSubject) -> Observation:
    _seed()
    subject.loss(subject.run(subject.input())).backward()
    return [torch.rand(4)]


def _autocast(subject: PitfallSubject) -> Observation:
    with torch.autocast("cpu", torch.bfloat16):
        loss = subject.loss(subject.run(subject.input()))
    loss.backward()
    return subject.gradients()


def _step(subject: PitfallSubject) -> Observation:
    x = subject.input()
    subject.loss(subject.run(x)).backward()
    return [x.grad, *subject.gradients()]


def _leaf_input(subject: PitfallSubject) -> Observation:
    x = subject.input()
    subject.loss(subject.module(x)).backward()
    return [x.grad]


def _frozen_input(subject: PitfallSubject) -> Observation:
    subject.loss(subject.run(subject.input(requires_grad=False))).backward()
    return subject.gradients()


def _frozen_parameters(subject: PitfallSubject) -> Observation:
    for function in subject.functions[:3]:  # the first block, and the second one's f
        function.requires_grad_(False)
    return _step(subject)


def _retained(subject: PitfallSubject) -> Observation:
    x = subject.input()
    loss = subject.loss(subject.run(x))
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *subject.gradients()]


def _autograd_grad(subject: PitfallSubject) -> Observation:
    return torch.autograd.grad(subject.loss(subject.run(subject.input())), subject.parameters)


def _double_backward(subject: PitfallSubject) -> Observation:
    x = subject.input()
    loss = subject.loss(subject.run(x))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + grad.square().sum()).backward()
    return [x.grad, *subject.gradients()]


def _relu_before(subject: PitfallSubject) -> Observation:
    x = subject.input()
    subject.loss(subject.module(x.relu())).backward()
    return [x.grad, *subject.gradients()]


def _skip_around(subject: PitfallSubject) -> Observation:
    x = subject.input()
    stem = 2 * x
    subject.loss(subject.module(stem) + stem).backward()
    return [x.grad, *subject.gradients()]


def _half_unused(subject: PitfallSubject) -> Observation:
    x = subject.input()
    subject.run(x).chunk(2, _SPLIT_DIM)[0].square().sum().backward()
    return [x.grad, *subject.gradients()]


def _mask(subject: PitfallSubject) -> Observation:
    x = subject.input()
    mask = torch.arange(5)[:, None] > 2
    subject.loss(subject.run(x, mask=mask)).backward()
    return [x.grad, *subject.gradients()]


def _context(subject: PitfallSubject) -> Observation:
    x = subject.input()
    source = torch.linspace(0, 1, 3, dtype=x.dtype).requires_grad_()
    subject.loss(subject.run(x, context=source.exp())).backward()  # as from an encoder
    return [source.grad, x.grad, *subject.gradients()]


def _evaluation(subject: PitfallSubject) -> Observation:
    assert isinstance(subject.module, nn.Module)
    subject.module.eval()
    return _step(subject)


def _output_modified(subject: PitfallSubject) -> Observation:
    x = subject.input()
    y = subject.run(x)
    loss = subject.loss(y)
    with torch.no_grad():
        y.add_(1)
    loss.backward()
    return [x.grad, *subject.gradients()]


def _exception(subject: PitfallSubject) -> Observation:
    """Run a step that fails in the forward pass, one that fails in the backward pass, and one that succeeds."""
    failing = subject.functions[2]
    assert isinstance(failing, _Linear)
    for fails_forward in (True, False):
        try:
            failing.fails = fails_forward
            loss = subject.loss(subject.run(subject.input()))
            failing.fails = True
            loss.backward()
        except ArithmeticError:
            pass
    failing.fails = False
    subject.zero_grad()
    return _step(subject)


@dataclass(frozen=True)
class Pitfall:
    """A situation that a method may handle incorrectly."""

    name: str
    observe: Callable[[PitfallSubject], Observation]
    make_function: Callable[[], nn.Module] = _Linear
    shape: tuple[int, ...] = (4, 5, 6)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-8
    """Relative L2 distance that counts as equal: rounding of a reconstruction in float64."""
    accepted_error: str | None = None
    """Part of an error message that counts as a correct answer too."""
    compile_options: dict[str, Any] | None = None
    """Options of `torch.compile` for the method. Plain autograd is not compiled."""
    is_slow: bool = False

    def check(self, method: Method) -> tuple[str, str]:
        """Compare a method with plain autograd.

        Returns:
            "ok", "wrong" or "raises", and one line of explanation.
        """
        expected = self.observe(self._subject(PLAIN))
        try:
            subject = self._subject(method)
            if self.compile_options is not None:
                subject.module = torch.compile(subject.module, **self.compile_options)
            actual = self.observe(subject)
        except Exception as error:
            message = one_line(error)
            refused = self.accepted_error is not None and self.accepted_error in message
            return ("ok" if refused else "raises"), message
        distance = max(_distance(a, b) for a, b in zip(actual, expected, strict=True))
        return ("ok" if distance <= self.tolerance else "wrong"), f"relative distance {distance:.1e}"

    def _subject(self, method: Method) -> PitfallSubject:
        torch.manual_seed(0)
        functions = [(self.make_function().to(self.dtype), self.make_function().to(self.dtype)) for _ in range(_DEPTH)]
        x = torch.randn(self.shape, dtype=self.dtype)
        _seed()
        return PitfallSubject(method, functions, x)


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, with the next one if it ends with a colon."""
    first, *others = str(error).strip().splitlines() or [""]
    if first.endswith(":"):
        first = " ".join([first, *others[:1]])
    return f"{type(error).__name__}: {first}"[:200]


def _distance(actual: Tensor | None, expected: Tensor | None) -> float:
    """Return the relative L2 distance. A missing gradient counts as zeros, and NaN as infinitely far."""
    if actual is None or expected is None:
        return sum(float(t.detach().norm()) for t in (actual, expected) if t is not None)
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    scale = expected.detach().double().norm().item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale else difference


_AOT = {"backend": "aot_eager"}

PITFALLS: Sequence[Pitfall] = (
    Pitfall("batch norm counted once", _buffers, _batch_norm),
    Pitfall("dropout", _dropout_gradient, _dropout, tolerance=1e-5),
    Pitfall("dropout, called twice before backward", _dropout_twice, _dropout, tolerance=1e-5),
    Pitfall("global random state after the step", _random_state, _dropout),
    Pitfall("bfloat16 autocast", _autocast, _wide, (16, 16, 64), torch.float32, tolerance=1e-3),
    Pitfall("gradient of a leaf input", _leaf_input),
    Pitfall("frozen input", _frozen_input),
    Pitfall("frozen parameters", _frozen_parameters),
    Pitfall("retain_graph, second backward", _retained),
    Pitfall("autograd.grad of parameters", _autograd_grad),
    Pitfall("double backward", _double_backward),
    Pitfall("ReLU before the blocks", _relu_before),
    Pitfall("skip around the blocks", _skip_around),
    Pitfall("one stream unused", _half_unused),
    Pitfall("keyword argument", _mask),
    Pitfall("argument that needs a gradient", _context),
    Pitfall("backward in evaluation mode", _evaluation, _both),
    Pitfall("output modified before backward", _output_modified, accepted_error="modified"),
    Pitfall("step after an exception in f", _exception),
    Pitfall("torch.compile", _step, compile_options=_AOT, is_slow=True),
    Pitfall("torch.compile(fullgraph=True)", _step, compile_options={**_AOT, "fullgraph": True}, is_slow=True),
)
