"""The attributes that every coupling must define, including third-party couplings."""

import pytest
import torch

from revnet import ReversibleBlock, ReversibleSequential
from revnet.coupling import AbstractCoupling, Additive, Affine, FixedPoint, Momentum
from tests.helpers import assert_close, gradients, mlp, stored_twin


class Base(AbstractCoupling):
    """Still abstract, so it need not define `is_additive`."""

    def prepare(self, x):
        return x


def define_scaling(*bases, **attributes):
    """Return a coupling class that scales, `y = 2 x + residual`, so that `x` gets twice the gradient of `y`."""

    def forward(self, x, residual, name="f"):
        return 2 * x + residual

    return type("Scaling", bases, {"forward": forward, **attributes})


@pytest.mark.parametrize("bases", [(AbstractCoupling,), (Base,), (Additive,), (FixedPoint,), (Base, Affine)])
def test_forward_without_is_additive_raises(bases):
    """If it were treated as additive, it would silently get wrong gradients."""
    with pytest.raises(TypeError, match=r"^Scaling defines `forward`, so it must define `is_additive` too: True if"):
        define_scaling(*bases)
    assert define_scaling(*bases, is_additive=False).is_additive is False


def test_subclass_without_forward_inherits_is_additive():
    class Named(Additive):
        def limit(self, dtype):
            return None

    assert Named().is_additive


def test_couplings_define_is_additive():
    assert {coupling: coupling.is_additive for coupling in (Additive, Affine, FixedPoint, Momentum)} == {
        Additive: True,
        Affine: False,
        FixedPoint: True,
        Momentum: False,
    }
    assert not hasattr(AbstractCoupling, "is_additive")


def test_a_subclass_that_is_not_additive_is_not_linear():
    class Gated(Additive):
        is_additive = False

        def forward(self, x, residual, name="f"):
            return x * 2 + residual * x.detach()

    class Halved(Additive):
        is_additive = False
        is_linear = True

    assert Additive.is_linear
    assert not Gated.is_linear
    assert Halved.is_linear


class Gate(AbstractCoupling):
    """Finishes its inverse in place, to save memory."""

    is_additive = False

    def prepare(self, x):
        return x

    def forward(self, x, residual, name="f"):
        return x * residual.tanh().exp() + residual

    def inverse(self, y, residual, name="f", *, in_place=False):
        x = y - residual
        x *= (-residual.tanh()).exp()
        return x

    def log_det(self, x, residual):
        return residual.tanh().flatten(1).sum(1)

    def limit(self, dtype):
        return None


def test_inverse_may_write_to_its_own_tensors():
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4), coupling=Gate()) for _ in range(3)]).double()
    twin, x = stored_twin(sequence), torch.randn(5, 8, dtype=torch.float64)
    for module in (sequence, twin):
        module(x).square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))
