"""Each correction is right, and PyTorch still needs it."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from revnet._torch_internals import FakeTensorMode
from revnet._torch_release import OLDEST, RELEASE
from revnet.memory.step._cpu_kernels import CpuKernels

aten = torch.ops.aten


def mixed_norm():
    x, weight = torch.ones(2, 3, 4, dtype=torch.bfloat16), torch.ones(4)
    return aten.native_layer_norm.default(x, [4], weight, weight, 1e-5)


def batch_norm_without_input_gradient():
    x, one = torch.ones(2, 3, 4), torch.ones(3)
    return aten.native_batch_norm_backward.default(x, x, one, one, one, one, one, True, 1e-5, [False, True, True])


def layer_norm_of_a_permuted_input():
    x, one = torch.ones(2, 4, 3).permute(0, 2, 1), torch.ones(4)
    statistic = torch.ones(2, 3, 1)
    return aten.native_layer_norm_backward.default(x, x, [4], statistic, statistic, one, one, [True, True, True])


def mixed_group_norm():
    x, one, statistic = torch.ones(2, 4, 3, dtype=torch.bfloat16), torch.ones(4), torch.ones(2, 2)
    return aten.native_group_norm_backward.default(x, x, statistic, statistic, one, 2, 4, 3, 2, [True, True, True])


def attention_in_float64():
    x = torch.ones(2, 3, 5, 4, dtype=torch.float64)
    return aten._scaled_dot_product_flash_attention_for_cpu.default(x, x, x)


def loss(name, *arguments, target=(4, 3)):
    def run():
        return [getattr(aten, name).default(torch.rand(4, 3), torch.rand(target), *arguments)]

    run.__name__ = name
    return run


def folded():
    return [aten.col2im.default(torch.ones(1, 18, 16), [4, 4], [3, 3], [1, 1], [1, 1], [1, 1])]


def embedding_bag():
    tokens, offsets = torch.zeros(20, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    return aten._embedding_bag.default(torch.ones(10, 8), tokens, offsets, False, 1)


LAYOUTS = [
    *(((5, 8, 1, 1), (8, 1, 8, 8)), ((5, 8, 1, 1), (8, 1, 1, 1))),  # maps of 1 x 1 in two forms
    *(((5, 8, 3, 2), (48, 1, 16, 8)), ((5, 8, 3, 2), (48, 6, 2, 1))),  # channels last, and first
    *(((5, 1, 3, 2), (6, 1, 2, 1)), ((5, 8, 1, 2), (16, 1, 16, 8)), ((8, 1, 1), (1, 1, 1))),
    *(((5, 8, 1, 1, 1), (8, 1, 8, 8, 8)), ((4, 1), (1, 7)), ((4, 1, 3), (1, 1, 4))),
]
"""Shapes and strides, most of which other strides would describe as well. The first 7 can be combined."""
UNARY = "neg exp gelu silu sigmoid tanh relu hardswish elu softplus leaky_relu mish log_sigmoid isnan clone"
BINARY = "add sub mul div eq maximum pow atan2 sigmoid_backward silu_backward gelu_backward hardswish_backward"


def pointwise():
    """Many operations on maps of 1 x 1, and some operations on all layouts."""
    tensors = [torch.ones(240).as_strided(*layout) for layout in LAYOUTS]
    x, y = tensors[:2]
    results = [getattr(aten, name)(x) for name in UNARY.split()]
    results += [getattr(aten, name)(x, y) for name in BINARY.split()]
    results += [1 - x, x > 0, x**2, x.clamp(min=0), x.lerp(y, 0.5), x.masked_fill(x > 0, 1), torch.addcmul(x, x, y)]
    results += [operation for x in tensors for operation in (-x, 2 * x)]
    for x, y in itertools.product(tensors[:7], tensors[:3]):
        results += [x + y, aten.threshold_backward(x, y, 0), aten.leaky_relu_backward(x, y, 0.1, False)]
    return results


def described(results):
    return [
        (result.dtype, result.shape, result.stride(), result.untyped_storage().nbytes())
        if isinstance(result, Tensor)
        else result
        for result in results
    ]


FIXED = {attention_in_float64: (2, 12)}
"""The first release whose shape function is right."""


@pytest.mark.parametrize(
    "run",
    [
        pointwise,
        mixed_norm,
        batch_norm_without_input_gradient,
        layer_norm_of_a_permuted_input,
        mixed_group_norm,
        attention_in_float64,
        loss("mse_loss", 1),
        loss("mse_loss", 2, target=(2, 1, 3)),
        loss("smooth_l1_loss", 1, 1.0),
        loss("soft_margin_loss", 1),
        loss("binary_cross_entropy", None, 1),
        folded,
        embedding_bag,
    ],
    ids=lambda run: run.__name__,
)
def test_corrects_the_shape_function(run):
    real = described(run())
    fake = {}
    for name, kernels in (("plain", nullcontext()), ("corrected", CpuKernels())):
        with FakeTensorMode(), kernels:
            fake[name] = described(run())
    assert fake["corrected"] == real
    if run in FIXED and FIXED[run] <= RELEASE:
        assert FIXED[run] > OLDEST, "no supported release needs this correction: delete it from `CpuKernels`"
        return
    assert fake["plain"] != real, "PyTorch has fixed its shape function: delete this correction from `CpuKernels`"
