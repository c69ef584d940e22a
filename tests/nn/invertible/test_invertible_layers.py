import pytest
import torch
import torch.nn.functional as F

from revnet.nn import ActNorm, ChannelPermutation, HaarWavelet, InvertibleConv1x1, SpaceToDepth
from tests.helpers import assert_close


def test_space_to_depth_orders_channels_by_position():
    x = torch.randn(2, 3, 4, 6)
    y = SpaceToDepth()(x)
    places = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    assert torch.equal(y, torch.cat(places, 1))
    unshuffled = F.pixel_unshuffle(x, 2).view(2, 3, 4, 2, 3).transpose(1, 2).flatten(1, 2)
    assert torch.equal(y, unshuffled)


def test_haar_bands_are_means_and_differences():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    a, b, c, d = (x[..., row::2, column::2] for row in (0, 1) for column in (0, 1))
    bands = [a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]
    y = HaarWavelet().double()(x)
    assert_close(y, torch.cat(bands, 1) / 2, tolerance=1e-14)
    assert_close(y.square().sum(), x.square().sum(), tolerance=1e-12)


def test_haar_transform_of_a_constant_image_is_its_mean():
    y = HaarWavelet()(torch.full((1, 1, 4, 4), 3.0))
    assert torch.equal(y[:, 0], torch.full((1, 2, 2), 6.0))
    assert torch.equal(y[:, 1:], torch.zeros(1, 3, 2, 2))


def test_haar_transform_after_the_meta_device():
    with torch.device("meta"):
        layer = HaarWavelet()
    layer.to_empty(device="cpu").load_state_dict(HaarWavelet().state_dict())
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(layer(x), HaarWavelet()(x))
    assert list(HaarWavelet().buffers()) == []


def test_permutation_has_the_requested_order():
    x = torch.randn(2, 3, 4)
    assert torch.equal(ChannelPermutation(3, [2, 0, 1])(x), x[:, [2, 0, 1]])
    orders = {tuple(ChannelPermutation(8).order.tolist()) for _ in range(10)}
    assert len(orders) > 1
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(8))}


def test_convolution_starts_as_a_rotation():
    layer = InvertibleConv1x1(5).double()
    matrix = layer(torch.eye(5, dtype=torch.float64)).T
    assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64), tolerance=1e-5)  # drawn in float32
    assert_close(layer.log_det(torch.randn(2, 5, 3, 3).double()), torch.zeros(2).double(), tolerance=1e-5)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert_close(layer(x), F.conv2d(x, matrix[:, :, None, None]), tolerance=1e-12)


def test_convolution_stays_invertible_in_training_with_weight_decay():
    torch.manual_seed(0)
    layer = InvertibleConv1x1(4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        y, log_det = layer.forward_with_log_det(torch.randn(16, 4, 2, 2))
        (y.square().flatten(1).sum(1) / 2 - log_det).mean().backward()
        optimizer.step()
    x = torch.randn(3, 4, 2, 2)
    assert_close(layer.inverse(layer(x)), x, tolerance=1e-5)


def test_layers_in_low_precision_are_invertible():
    layer = InvertibleConv1x1(4).bfloat16()
    x = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)
    assert layer(x).dtype == layer.inverse(x).dtype == torch.bfloat16
    assert_close(layer.inverse(layer(x)), x, tolerance=0.1)  # eight bits


LAYERS = {
    "s2d": SpaceToDepth,
    "s2d3": lambda: SpaceToDepth(3),
    "haar": HaarWavelet,
    "permutation": lambda: ChannelPermutation(3),
    "conv": lambda: InvertibleConv1x1(3),
}


@pytest.mark.parametrize(
    ("name", "method", "shape", "message"),
    [
        ("s2d", "forward", (2, 3, 5, 4), r"`x` .*\(2, 3, 5, 4\).* multiples of 2; crop or pad the images to 6x4"),
        ("s2d3", "forward", (2, 3, 6, 5), r"multiples of 3; crop or pad the images to 6x6"),
        ("s2d", "forward", (2, 3, 4), r"`x` \(of shape \(2, 3, 4\)\) must be \(B, C, H, W\)"),
        ("s2d", "inverse", (2, 6, 4, 4), r"`y` .* multiple of 4 channels"),
        ("haar", "forward", (2, 3, 5, 5), r"multiples of 2; crop or pad the images to 6x6"),
        ("haar", "inverse", (2, 3, 4, 4), r"`y` .* multiple of 4 channels"),
        ("haar", "inverse", (2, 4), r"`y` .* must be \(B, C, H, W\)"),
        ("permutation", "forward", (2, 4, 4), r"`x` \(of shape \(2, 4, 4\)\) must be \(B, 3, \.\.\.\)"),
        ("permutation", "inverse", (3,), r"`y` \(of shape \(3,\)\) must be \(B, 3, \.\.\.\)"),
        ("conv", "forward", (2, 4), r"`x` .* must be \(B, 3, \.\.\.\)"),
        ("conv", "inverse", (2, 4), r"`y` .* must be \(B, 3, \.\.\.\)"),
    ],
)
def test_rejects_wrong_shapes(name, method, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(LAYERS[name](), method)(torch.randn(shape))


@pytest.mark.parametrize("make", [HaarWavelet, lambda: ActNorm(4), lambda: InvertibleConv1x1(4)])
def test_rejects_complex_input(make):
    """The log-determinant would be half of the true one."""
    x = torch.randn(1, 4, 2, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"`x` has dtype torch.complex64, but must be floating-point; pass `x.real`"):
        make().forward_with_log_det(x)
    with pytest.raises(TypeError, match=r"`y` has dtype torch.complex64"):
        make().inverse(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpaceToDepth(0), r"`block_size` \(=0\) must be a positive integer"),
        (lambda: SpaceToDepth(2.0), r"`block_size` \(=2\.0\)"),
        (lambda: ChannelPermutation(0), r"`num_channels` \(=0\)"),
        (lambda: ChannelPermutation(3, [0, 1, 1]), r"`order` \(=\[0, 1, 1\]\) must hold each of the 3 channels once"),
        (lambda: InvertibleConv1x1(-1), r"`num_channels` \(=-1\)"),
    ],
)
def test_rejects_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_store_nothing_for_the_backward_pass():
    for make in (SpaceToDepth, HaarWavelet, lambda: ChannelPermutation(4)):
        layer = make()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            layer(torch.randn(2, 4, 4, 4, requires_grad=True))
        assert all(tensor.untyped_storage().nbytes() <= 64 for tensor in saved), make  # a matrix, or an order
