"""What every coupling must define, a third party's too."""

import pytest

from revnet.coupling import AbstractCoupling, Additive, Affine, FixedPoint, Momentum


class Base(AbstractCoupling):
    """Still abstract, so it need not say anything."""

    def prepare(self, x):
        return x


def define_scaling(*bases, **attributes):
    """A coupling that scales, `y = 2 x + residual`, so that `x` gets twice the gradient of `y`."""

    def forward(self, x, residual, name="f"):
        return 2 * x + residual

    return type("Scaling", bases, {"forward": forward, **attributes})


@pytest.mark.parametrize("bases", [(AbstractCoupling,), (Base,), (Additive,), (FixedPoint,), (Base, Affine)])
def test_a_forward_without_a_word_on_gradients_is_refused(bases):
    """Taken for additive, it would get wrong gradients in silence."""
    with pytest.raises(TypeError, match=r"^Scaling defines `forward`, so it must define `is_additive` too: True if"):
        define_scaling(*bases)
    assert define_scaling(*bases, is_additive=False).is_additive is False


def test_a_subclass_that_changes_something_else_inherits():
    class Named(Additive):
        def limit(self, dtype):
            return None

    assert Named().is_additive


def test_the_couplings_say_what_they_are():
    assert {coupling: coupling.is_additive for coupling in (Additive, Affine, FixedPoint, Momentum)} == {
        Additive: True,
        Affine: False,
        FixedPoint: True,
        Momentum: False,
    }
    assert not hasattr(AbstractCoupling, "is_additive")
