"""Digests of tensors on a GPU, as far as a CPU can test them: their operators give the same results on any device."""

import pytest
import torch

from revnet import ReversibleBlock, ReversibleSequential
from revnet.engine import Chain, HalfBlock, _agreement, _observers, _suspicion
from revnet.engine._agreement import AgreementWatch
from revnet.engine._device_digest import WAITING_INTERVAL, checksum_on_device, may_wait_for, sample_on_device
from revnet.engine._digest import digest_of
from revnet.engine._drift import DriftWatch
from revnet.engine._streams import StreamSnapshot
from tests.helpers import assert_outside_randomness_raises, assert_silent_write_raises, mlp

LAYOUTS = {
    "contiguous": torch.randn(3, 5, 7, 11),
    "channels last": torch.randn(3, 5, 7, 11).to(memory_format=torch.channels_last),
    "a part": torch.randn(3, 10, 7, 11)[:, 5:],
    "transposed": torch.randn(8, 9, 10).transpose(1, 2),
    "double": torch.randn(40, 2, dtype=torch.float64),
    "half": torch.randn(33).half(),
    "integers": torch.arange(50),
    "a number": torch.tensor(3.0),
    "nothing": torch.randn(0, 4),
}

all_layouts = pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)


@all_layouts
def test_sample_has_the_elements_of_a_digest(x):
    assert sample_on_device(x) == digest_of(x)


def test_complex_sample_has_real_and_imaginary_parts():
    x = torch.randn(8, dtype=torch.complex64)
    assert sample_on_device(x) == torch.view_as_real(x).flatten().double().tolist()


@all_layouts
def test_checksum_detects_one_bit(x):
    if x.numel() == 0:
        return
    y = x.clone()
    before = checksum_on_device(y)
    assert checksum_on_device(x) == before
    y.view(-1)[-1:].copy_(y.view(-1)[-1:] * 2 + 1) if y.is_contiguous() else y.mul_(2)
    assert checksum_on_device(y) != before


def test_does_not_wait_for_cpu_tensors():
    assert not may_wait_for(torch.randn(3))
    assert not may_wait_for(torch.randn(3, device="meta"))


def test_waits_for_a_gpu_in_the_first_run_and_every_64th_after(monkeypatch):
    monkeypatch.setattr(_observers, "may_wait_for", lambda x: True)
    monkeypatch.setattr(_observers, "can_digest", lambda x: False)
    monkeypatch.setattr(_observers, "_is_on_host", lambda x: False)
    chain = Chain([HalfBlock(mlp(4), 0, 1), HalfBlock(mlp(4), 1, 0)])
    streams = (torch.randn(2, 4), torch.randn(2, 4))
    kinds = []
    for run in range(1, 2 * WAITING_INTERVAL + 2):
        chain.num_runs = run
        (observer,) = _observers.observers_of(chain.bind(), streams)
        kinds.append(type(observer))
    waiting = [run for run, kind in enumerate(kinds, 1) if kind is AgreementWatch]
    assert waiting == [1, 1 + WAITING_INTERVAL, 1 + 2 * WAITING_INTERVAL]
    assert {*kinds} == {AgreementWatch, DriftWatch}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Make runs read their streams with device operators."""
    monkeypatch.setattr(_agreement, "digest_of", sample_on_device)
    monkeypatch.setattr(_agreement, "checksum", checksum_on_device)
    monkeypatch.setattr(_agreement, "reader_of", lambda dtype, numel: (None, slice(None)))
    monkeypatch.setattr(_suspicion, "digest_of", sample_on_device)


@pytest.mark.parametrize("place", range(4))
def test_random_numbers_from_outside_raise(as_on_a_gpu, place):
    assert_outside_randomness_raises(place)


def test_overwritten_output_raises(as_on_a_gpu):
    assert_silent_write_raises()


def test_correct_functions_do_not_raise(as_on_a_gpu):
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8), split_dim=-1) for _ in range(32)])
    for _ in range(3):
        sequence(torch.randn(5, 16)).square().sum().backward()


def test_perturbs_a_stream_on_its_device():
    streams = StreamSnapshot(0, [torch.randn(3, device="meta")], [(1,)])
    half_block = HalfBlock(torch.nn.Identity(), target=1, source=0)
    assert _suspicion._perturbed(streams, half_block, (1e-3, 0.0)).read(0).is_meta
