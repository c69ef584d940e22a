"""What goes wrong in reversible code, each on three tiny blocks. A new trap is one entry in `TRAPS`.

A trap runs once with the stored twin under plain autograd and once with a contender, from the same weights, input and
random state, and returns what it saw: gradients, buffers, the random state. The contender has to return the same.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revnet.bench.cases import FunctionPair
from revnet.bench.contenders import PLAIN, Contender

_DEPTH = 3
_SPLIT_DIM = 2  # the only one that all contenders can split along

Observation = Sequence[Tensor | None]


class Specimen:
    """Blocks under one contender, about to meet a trap."""

    def __init__(self, contender: Contender, functions: Sequence[FunctionPair], x: Tensor):
        self.functions = copy.deepcopy([function for pair in functions for function in pair])
        pairs = list(zip(self.functions[0::2], self.functions[1::2], strict=True))
        self.module: Callable[..., Tensor] = contender.make(pairs, _SPLIT_DIM)
        self.parameters = [parameter for function in self.functions for parameter in function.parameters()]
        self._x = x
        self._weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def input(self, *, requires_grad: bool = True) -> Tensor:
        """A fresh copy of the input: memcnn overwrites it."""
        return self._x.clone().requires_grad_(requires_grad)

    def run(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The output for `x`, which comes from a stem that keeps nothing, as in a network."""
        return self.module(x.clone(), **kwargs)

    def loss(self, y: Tensor) -> Tensor:
        """A loss that keeps no activation."""
        return (y * self._weights).sum()

    def gradients(self) -> list[Tensor | None]:
        """Those of all parameters."""
        return [parameter.grad for parameter in self.parameters]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class _Linear(nn.Module):
    """Linear, tanh, linear: smooth everywhere; with more arguments, and a failure on demand."""

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


def _buffers(specimen: Specimen) -> Observation:
    specimen.loss(specimen.run(specimen.input())).backward()
    return [buffer for function in specimen.functions for buffer in function.buffers()]


def _slope_ratio(specimen: Specimen, loss: Callable[[], Tensor]) -> Observation:
    """The directional derivative that the gradients give, over that of a finite difference: a contender may draw other
    random numbers than the twin, and still be right.
    """  # noqa: D205
    directions = [torch.ones_like(parameter) for parameter in specimen.parameters]
    _seed()
    loss().backward()
    slope = sum(
        (direction * grad).sum()
        for direction, grad in zip(directions, specimen.gradients(), strict=True)
        if grad is not None
    )
    values = []
    step = 1e-5
    with torch.no_grad():
        for factor in (step, -2 * step):
            for parameter, direction in zip(specimen.parameters, directions, strict=True):
                parameter.add_(direction, alpha=factor)
            _seed()
            values.append(loss())
    return [torch.as_tensor(slope) * 2 * step / (values[0] - values[1])]


def _dropout_gradient(specimen: Specimen) -> Observation:
    return _slope_ratio(specimen, lambda: specimen.loss(specimen.run(specimen.input())))


def _dropout_twice(specimen: Specimen) -> Observation:
    def loss() -> Tensor:
        first, second = (specimen.run(specimen.input()) for _ in range(2))
        return specimen.loss(first) + 2 * specimen.loss(second).square()

    return _slope_ratio(specimen, loss)


def _random_state(specimen: Specimen) -> Observation:
    _seed()
    specimen.loss(specimen.run(specimen.input())).backward()
    return [torch.rand(4)]


def _autocast(specimen: Specimen) -> Observation:
    with torch.autocast("cpu", torch.bfloat16):
        loss = specimen.loss(specimen.run(specimen.input()))
    loss.backward()
    return specimen.gradients()


def _step(specimen: Specimen) -> Observation:
    x = specimen.input()
    specimen.loss(specimen.run(x)).backward()
    return [x.grad, *specimen.gradients()]


def _leaf_input(specimen: Specimen) -> Observation:
    x = specimen.input()
    specimen.loss(specimen.module(x)).backward()
    return [x.grad]


def _frozen_input(specimen: Specimen) -> Observation:
    specimen.loss(specimen.run(specimen.input(requires_grad=False))).backward()
    return specimen.gradients()


def _frozen_parameters(specimen: Specimen) -> Observation:
    for function in specimen.functions[:3]:  # the first block, and the second one's f
        function.requires_grad_(False)
    return _step(specimen)


def _retained(specimen: Specimen) -> Observation:
    x = specimen.input()
    loss = specimen.loss(specimen.run(x))
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *specimen.gradients()]


def _autograd_grad(specimen: Specimen) -> Observation:
    return torch.autograd.grad(specimen.loss(specimen.run(specimen.input())), specimen.parameters)


def _double_backward(specimen: Specimen) -> Observation:
    x = specimen.input()
    loss = specimen.loss(specimen.run(x))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + grad.square().sum()).backward()
    return [x.grad, *specimen.gradients()]


def _relu_before(specimen: Specimen) -> Observation:
    x = specimen.input()
    specimen.loss(specimen.module(x.relu())).backward()
    return [x.grad, *specimen.gradients()]


def _skip_around(specimen: Specimen) -> Observation:
    x = specimen.input()
    stem = 2 * x
    specimen.loss(specimen.module(stem) + stem).backward()
    return [x.grad, *specimen.gradients()]


def _half_unused(specimen: Specimen) -> Observation:
    x = specimen.input()
    specimen.run(x).chunk(2, _SPLIT_DIM)[0].square().sum().backward()
    return [x.grad, *specimen.gradients()]


def _mask(specimen: Specimen) -> Observation:
    x = specimen.input()
    mask = torch.arange(5)[:, None] > 2
    specimen.loss(specimen.run(x, mask=mask)).backward()
    return [x.grad, *specimen.gradients()]


def _context(specimen: Specimen) -> Observation:
    x = specimen.input()
    source = torch.linspace(0, 1, 3, dtype=x.dtype).requires_grad_()
    specimen.loss(specimen.run(x, context=source.exp())).backward()  # as from an encoder
    return [source.grad, x.grad, *specimen.gradients()]


def _evaluation(specimen: Specimen) -> Observation:
    assert isinstance(specimen.module, nn.Module)
    specimen.module.eval()
    return _step(specimen)


def _output_modified(specimen: Specimen) -> Observation:
    x = specimen.input()
    y = specimen.run(x)
    loss = specimen.loss(y)
    with torch.no_grad():
        y.add_(1)
    loss.backward()
    return [x.grad, *specimen.gradients()]


def _exception(specimen: Specimen) -> Observation:
    """One step fails on its way forward, one on its way back; then one that does not."""
    failing = specimen.functions[2]
    assert isinstance(failing, _Linear)
    for fails_forward in (True, False):
        try:
            failing.fails = fails_forward
            loss = specimen.loss(specimen.run(specimen.input()))
            failing.fails = True
            loss.backward()
        except ArithmeticError:
            pass
    failing.fails = False
    specimen.zero_grad()
    return _step(specimen)


@dataclass(frozen=True)
class Trap:
    """Something that a contender may get wrong."""

    name: str
    observe: Callable[[Specimen], Observation]
    make_function: Callable[[], nn.Module] = _Linear
    shape: tuple[int, ...] = (4, 5, 6)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-8
    """Relative L2 distance that counts as equal: the rounding of a reconstruction in float64."""
    may_say: str | None = None
    """The contender may also refuse, by an error whose message holds this."""
    compile_options: dict[str, Any] | None = None
    """The contender, not the twin, is compiled with these."""
    is_slow: bool = False

    def check(self, contender: Contender) -> tuple[str, str]:
        """Send a contender into the trap.

        Returns:
            "ok", "wrong" or "raises", and a line about it.
        """
        expected = self.observe(self._specimen(PLAIN))
        try:
            specimen = self._specimen(contender)
            if self.compile_options is not None:
                specimen.module = torch.compile(specimen.module, **self.compile_options)
            actual = self.observe(specimen)
        except Exception as error:
            message = one_line(error)
            refused = self.may_say is not None and self.may_say in message
            return ("ok" if refused else "raises"), message
        distance = max(_distance(a, b) for a, b in zip(actual, expected, strict=True))
        return ("ok" if distance <= self.tolerance else "wrong"), f"relative distance {distance:.1e}"

    def _specimen(self, contender: Contender) -> Specimen:
        torch.manual_seed(0)
        functions = [(self.make_function().to(self.dtype), self.make_function().to(self.dtype)) for _ in range(_DEPTH)]
        x = torch.randn(self.shape, dtype=self.dtype)
        _seed()
        return Specimen(contender, functions, x)


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:200]


def _distance(actual: Tensor | None, expected: Tensor | None) -> float:
    """Relative L2 distance. No gradient is as good as zeros; what is not a number is infinitely far."""
    if actual is None or expected is None:
        return sum(float(t.detach().norm()) for t in (actual, expected) if t is not None)
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    scale = expected.detach().double().norm().item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale else difference


_AOT = {"backend": "aot_eager"}

TRAPS: Sequence[Trap] = (
    Trap("batch norm counted once", _buffers, _batch_norm),
    Trap("dropout", _dropout_gradient, _dropout, tolerance=1e-5),
    Trap("dropout, called twice before backward", _dropout_twice, _dropout, tolerance=1e-5),
    Trap("global random stream ends as plain's", _random_state, _dropout),
    Trap("bfloat16 autocast", _autocast, _wide, (16, 16, 64), torch.float32, tolerance=1e-3),
    Trap("gradient of a leaf input", _leaf_input),
    Trap("frozen input", _frozen_input),
    Trap("frozen parameters", _frozen_parameters),
    Trap("retain_graph, second backward", _retained),
    Trap("autograd.grad of parameters", _autograd_grad),
    Trap("double backward", _double_backward),
    Trap("ReLU before the blocks", _relu_before),
    Trap("skip around the blocks", _skip_around),
    Trap("one stream unused", _half_unused),
    Trap("keyword argument", _mask),
    Trap("argument that needs a gradient", _context),
    Trap("backward in evaluation mode", _evaluation, _both),
    Trap("output modified before backward", _output_modified, may_say="modified"),
    Trap("step after an exception in f", _exception),
    Trap("torch.compile", _step, compile_options=_AOT, is_slow=True),
    Trap("torch.compile(fullgraph=True)", _step, compile_options={**_AOT, "fullgraph": True}, is_slow=True),
)
