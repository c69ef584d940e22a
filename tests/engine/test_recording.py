"""Passes whose output is not held: gradients, bytes, and streams that are not the ones of the pass."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from revnet import (
    AbstractPolicy,
    Checkpoint,
    FixedPoint,
    Offload,
    ReconstructionError,
    ReconstructionWarning,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
)
from revnet.engine import DriftMeter
from revnet.engine._recording import RecordedRun
from revnet.memory.step._live import LiveBytes
from tests.helpers import CASE, all_cases, assert_close, mlp

DEPTH = 4


def pair_for(sequence, case):
    x = case.input(requires_grad=False)
    return tuple(stream.clone() for stream in x.chunk(sequence[0].num_streams, sequence[0].split_dim))


def stored_gradients(sequence, streams, grads, *args, **kwargs):
    """Return the stored twin after its backward pass, its output, and the gradients of its inputs."""
    twin = copy.deepcopy(sequence)
    twin.set_policies(Store())
    twin.tolerance = None
    inputs = [stream.clone().requires_grad_() for stream in streams]
    y = twin(tuple(inputs), *args, **kwargs)
    torch.autograd.backward(y, grads)
    return twin, y, [stream.grad for stream in inputs]


def assert_same_gradients(sequence, twin, compare=assert_close):
    for (name, parameter), expected in zip(sequence.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            compare(parameter.grad, expected.grad)
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        compare(buffer, expected)


@all_cases
def test_gradients_and_input_are_as_in_the_stored_twin(case):
    sequence = case.sequence(DEPTH)
    streams, args, kwargs = pair_for(sequence, case), case.args(), case.kwargs()
    grads = [torch.randn_like(stream) for stream in streams]
    state = torch.get_rng_state()
    twin, y, input_grads = stored_gradients(sequence, streams, grads, *args, **kwargs)
    torch.set_rng_state(state)
    output, recording = sequence.record(streams, args, kwargs)
    for actual, expected in zip(output, y, strict=True):
        assert torch.equal(actual, expected)
        assert not actual.requires_grad
    torch.rand(3)  # the backward pass finds another random state
    inputs, actual_grads = recording.backward(list(output), list(grads))
    for actual, expected in zip([*inputs, *actual_grads], [*streams, *input_grads], strict=True):
        # The input is put on the grid.
        bound = 2.0**-40 if case.name.startswith("fixed-point") else 0.0
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=max(1e-12, bound))
    assert_same_gradients(sequence, twin)


POLICIES = {
    "reverse": ([Reverse()] * 4, True),
    "stored first": ([Store(), Store(), Reverse(), Reverse()], True),
    "stored last": ([Reverse(), Reverse(), Reverse(), Store()], False),
    "checkpointed": ([Checkpoint()] * 4, False),
    "offloaded between": ([Reverse(), Offload(), Checkpoint(), Reverse()], True),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("needs_input", [True, False])
def test_mixed_policies(name, needs_input):
    policies, needs_output = POLICIES[name]
    case = CASE["conv-dropout"]
    sequence = case.sequence(DEPTH, policies)
    streams = pair_for(sequence, case)
    grads = [torch.randn_like(stream) for stream in streams]
    state = torch.get_rng_state()
    twin, _, input_grads = stored_gradients(sequence, streams, grads)
    torch.set_rng_state(state)
    output, recording = sequence.record(streams, needs_input=needs_input)
    assert recording.needs_output == needs_output
    inputs, actual_grads = recording.backward(output if needs_output else None, grads)
    if needs_input:
        for actual, expected in zip(inputs, streams, strict=True):
            assert_close(actual, expected)
    else:
        assert inputs is None
    for actual, expected in zip(actual_grads, input_grads, strict=True):
        assert_close(actual, expected)
    assert_same_gradients(sequence, twin)


def test_policy_of_ones_own_is_recorded():
    class Mine(AbstractPolicy):
        def run(self, chain, streams):
            return Reverse().run(chain, streams)

    class Changes(AbstractPolicy):
        def run(self, chain, streams):
            return tuple(2 * stream for stream in Reverse().run(chain, streams))

    case = CASE["mlp"]
    sequence = case.sequence(DEPTH, Mine())
    _, recording = sequence.record(pair_for(sequence, case))
    assert recording.needs_output
    sequence.set_policies(Changes())
    with pytest.raises(NotImplementedError, match=r"the policy of `blocks\.0\.f` changes the streams"):
        sequence.record(pair_for(sequence, case))


def test_tolerance_keeps_the_output():
    case = CASE["mlp"]
    sequence = case.sequence(DEPTH)
    sequence.tolerance = 1e-6
    streams = pair_for(sequence, case)
    grads = [torch.randn_like(stream) for stream in streams]
    twin, _, input_grads = stored_gradients(sequence, streams, grads)
    for _ in range(2):
        sequence.zero_grad()
        _, recording = sequence.record(streams)
        assert not recording.needs_output
        # What another process sends back is not used.
        inputs, actual_grads = recording.backward([torch.full_like(stream, 7.0) for stream in streams], tuple(grads))
    for actual, expected in zip([*inputs, *actual_grads], [*streams, *input_grads], strict=True):
        assert_close(actual, expected)
    assert_same_gradients(sequence, twin)


def test_exact_coupling_ignores_the_tolerance():
    sequence = CASE["fixed-point-mlp"].sequence(DEPTH)
    sequence.tolerance = 1e-6
    _, recording = sequence.record(pair_for(sequence, CASE["fixed-point-mlp"]))
    assert recording.needs_output


@pytest.mark.parametrize("coupling", [FixedPoint(), FixedPoint(is_wide=True)], ids=str)
def test_exact_stages_equal_the_whole_to_the_last_bit(coupling):
    """Two sequences in a row, as in a pipeline, whose streams are not rounded in between."""
    blocks = [ReversibleBlock(mlp(3), mlp(3), split_dim=-1, coupling=coupling) for _ in range(5)]
    whole, x = ReversibleSequential(*blocks), torch.randn(4, 6)
    twin = copy.deepcopy(whole)
    twin.set_policies(Store())
    y = twin(x)
    y.square().mean().backward()
    first, second = whole[:3], whole[3:]
    middle, lower = first.record(x, needs_input=False)
    streams, upper = second.record(middle, is_prepared=True, input_dtype=lower.input_dtype)
    leaves = [stream.requires_grad_() for stream in streams]
    output = torch.cat([stream.to(x.dtype) for stream in leaves], -1)
    assert torch.equal(output, y)
    output.square().mean().backward()
    middle_again, grads = upper.backward(streams, [leaf.grad for leaf in leaves])
    assert all(map(torch.equal, middle_again, middle))
    lower.backward(middle_again, grads, distance=4)
    for parameter, expected in zip(whole.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_backward_pass_continues_into_the_graph_of_the_input():
    stem, sequence = nn.Linear(2, 6), CASE["mlp"].sequence(2).float()
    x = torch.randn(4, 2)
    twin = copy.deepcopy(nn.Sequential(stem, sequence))
    twin[1].set_policies(Store())
    twin(x).sum().backward()
    output, recording = sequence.record(stem(x), needs_input=False)
    recording.backward(output, [torch.ones_like(stream) for stream in output])
    torch.testing.assert_close(stem.weight.grad, twin[0].weight.grad)
    torch.testing.assert_close(stem.bias.grad, twin[0].bias.grad)


def test_blocks_with_hooks_are_called():
    case = CASE["mlp"]
    sequence = case.sequence(DEPTH)
    calls = []
    sequence[1].register_forward_hook(lambda *_: calls.append(1))
    streams = pair_for(sequence, case)
    grads = [torch.randn_like(stream) for stream in streams]
    twin, _, _ = stored_gradients(sequence, streams, grads)
    calls.clear()
    output, recording = sequence.record(streams)
    recording.backward(output, grads)
    assert calls == [1]
    assert_same_gradients(sequence, twin)


def test_frozen_functions_are_undone_too():
    case = CASE["mlp"]
    sequence = case.sequence(DEPTH)
    for block in (sequence[0], sequence[3]):
        for parameter in block.parameters():
            parameter.requires_grad_(False)
    streams = pair_for(sequence, case)
    grads = [torch.randn_like(stream) for stream in streams]
    twin, _, input_grads = stored_gradients(sequence, streams, grads)
    output, recording = sequence.record(streams)
    inputs, actual_grads = recording.backward(output, grads)
    for actual, expected in zip([*inputs, *actual_grads], [*streams, *input_grads], strict=True):
        assert_close(actual, expected)
    assert_same_gradients(sequence, twin)


def test_missing_gradients_are_allowed():
    case = CASE["mlp"]
    sequence = case.sequence(1)
    streams = pair_for(sequence, case)
    output, recording = sequence.record(streams)
    inputs, grads = recording.backward(output, [torch.ones_like(output[0]), None])
    # The second stream does not reach the first output without `g`, whose gradient is None.
    assert sequence[0].g[0].weight.grad is None
    assert_close(grads[0], torch.ones_like(output[0]))
    for actual, expected in zip(inputs, streams, strict=True):
        assert_close(actual, expected)


# Bytes ----------------------------------------------------------------------------------------------------------------


def big_sequence():
    return ReversibleSequential(*[ReversibleBlock(mlp(64), mlp(64), split_dim=-1) for _ in range(DEPTH)])


def test_recording_holds_no_stream():
    sequence = big_sequence()
    x = torch.randn(256, 128)
    streams = tuple(stream.clone() for stream in x.chunk(2, -1))
    with LiveBytes([*sequence.parameters(), *streams]) as live:
        output, recording = sequence.record(streams)
        assert live.live_bytes == x.nbytes
        del output
        assert live.live_bytes == 0
        del recording


def test_streams_that_come_back_are_overwritten():
    sequence = big_sequence()
    for parameter in sequence.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(256, 128)
    streams = tuple(stream.clone() for stream in x.chunk(2, -1))
    tensors = [*sequence.parameters(), *[parameter.grad for parameter in sequence.parameters()], *streams]
    output, recording = sequence.record(streams)
    copies, grads = [stream.clone() for stream in output], [torch.ones_like(stream) for stream in output]
    addresses = {stream.data_ptr() for stream in copies}
    with LiveBytes([*tensors, *output, *copies, *grads]):
        inputs, _ = recording.backward(copies, grads)
    assert copies == []
    assert grads == []
    assert {stream.data_ptr() for stream in inputs} == addresses


def test_streams_in_a_tuple_are_not_changed():
    sequence = big_sequence()
    output, recording = sequence.record(torch.randn(8, 128))
    before = [stream.clone() for stream in output]
    recording.backward(output, tuple(torch.ones_like(stream) for stream in output))
    assert all(map(torch.equal, output, before))


def test_recording_owns_the_run():
    """Nothing leads back to the recording, so that everything is freed with it, without the garbage collector."""
    sequence = big_sequence()
    gc.collect()
    gc.disable()
    try:
        _, recording = sequence.record(torch.randn(8, 128))
        run = weakref.ref(recording._released)
        assert isinstance(run(), RecordedRun)
        del recording
        assert run() is None
        output, recording = sequence.record(torch.randn(8, 128))
        run = weakref.ref(recording._released)
        recording.backward(output, [torch.ones_like(stream) for stream in output])
        assert run() is None
    finally:
        gc.enable()


# Streams that are not the ones of the pass ----------------------------------------------------------------------------


@pytest.fixture
def recorded():
    case = CASE["mlp"]
    sequence = case.sequence(DEPTH)
    output, recording = sequence.record(pair_for(sequence, case))
    return sequence, output, recording, [torch.ones_like(stream) for stream in output]


def test_output_of_another_pass_is_an_error(recorded):
    sequence, output, recording, grads = recorded
    other, _ = sequence.record(pair_for(sequence, CASE["mlp"]))
    with pytest.raises(ReconstructionError, match="`streams` differ from the output of this pass by"):
        recording.backward(other, grads)
    # Nothing has run, so that the right output can still be passed.
    recording.backward(output, grads)


def test_exact_coupling_allows_no_difference():
    sequence = CASE["fixed-point-mlp"].sequence(DEPTH)
    output, recording = sequence.record(pair_for(sequence, CASE["fixed-point-mlp"]))
    changed = [output[0] + 2.0**-40, output[1]]
    with pytest.raises(ReconstructionError, match="although the coupling is exact"):
        recording.backward(changed, [torch.ones_like(stream) for stream in output], distance=2)


def test_nan_that_comes_back_is_an_error(recorded):
    _, output, recording, grads = recorded
    with pytest.raises(ReconstructionError, match="`streams` differ"):
        recording.backward([output[0] * float("nan"), output[1]], grads)


def test_rounding_of_other_stages_does_not_raise(recorded):
    """An error that is large for one half-block is drift if the streams came back with it."""
    _, output, recording, grads = recorded
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReconstructionWarning)
        recording.backward([stream * (1 + 1e-9) for stream in output], grads, distance=100)


def test_drift_of_other_stages_is_reported(recorded):
    _, output, recording, grads = recorded
    with pytest.warns(ReconstructionWarning, match=r"the stream that `blocks\.0\.f` reads was rebuilt"):
        recording.backward([stream * (1 + 1e-3) for stream in output], grads, distance=100)


def test_meter_counts_the_distance_from_the_true_streams():
    case = CASE["mlp"]
    sequence = case.sequence(2)
    meter = DriftMeter()
    with meter.on():
        output, recording = sequence.record(pair_for(sequence, case))
    recording.backward(output, [torch.ones_like(stream) for stream in output], distance=10)
    assert [record.distance for record in meter.records] == [10, 11, 12, 13]
    assert max(float(record.error) for record in meter.records) < 1e-12


def test_finite_output_is_judged_when_it_is_released():
    """NaN that comes back must not pass for NaN of the model, also where drift is not sampled on the host."""
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4), split_dim=-1) for _ in range(2)]).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReconstructionWarning)
        output, recording = sequence.record(torch.randn(8, 8).bfloat16())
    changed = [stream * float("nan") for stream in output]
    with pytest.raises(ReconstructionError, match=r"contains NaN or inf|`streams` differ"):
        recording.backward(changed, [torch.ones_like(stream) for stream in output])


def test_second_call_is_an_error(recorded):
    _, output, recording, grads = recorded
    recording.backward(output, tuple(grads))
    with pytest.raises(RuntimeError, match="was called a second time"):
        recording.backward(output, tuple(grads))


def test_other_backward_passes_are_an_error(recorded):
    _, _, recording, grads = recorded
    with pytest.raises(ReconstructionError, match="`record` does not hold the output of the pass"):
        recording._root.backward(grads)


def test_modified_parameter_is_an_error(recorded):
    sequence, output, recording, grads = recorded
    with torch.no_grad():
        sequence[0].f[0].weight.add_(1)
    with pytest.raises(ReconstructionError, match="modified in place"):
        recording.backward(output, grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output, grads: (None, grads), "`streams`"),
        (lambda output, grads: (output[:1], grads), r"`streams` \(of length 1\)"),
        (lambda output, grads: (output, grads[:1]), r"`grads` \(of length 1\)"),
        (lambda output, grads: (output, 3), "`grads`"),
        (lambda output, grads: ([1, 2], grads), r"`streams\[0\]`"),
        (lambda output, grads: ([output[0].float(), output[1]], grads), r"`streams\[0\]` is .*float32"),
        (lambda output, grads: (output, [grads[0], grads[1][:1]]), r"`grads\[1\]` is \(1, 3\)"),
        (lambda output, grads: ((None, output[1]), grads), r"`streams\[0\]`"),
    ],
)
def test_rejects_wrong_streams_and_gradients(recorded, change, message):
    _, output, recording, grads = recorded
    with pytest.raises((TypeError, ValueError), match=message):
        recording.backward(*change(output, grads))
    recording.backward(output, grads)


@pytest.mark.parametrize("distance", [-1, 1.5, None, "x"])
def test_rejects_a_wrong_distance(recorded, distance):
    _, output, recording, grads = recorded
    with pytest.raises(ValueError, match="`distance`"):
        recording.backward(output, grads, distance=distance)


def test_without_gradients_there_is_no_backward_pass():
    case = CASE["fixed-point-mlp"]
    sequence = case.sequence(DEPTH)
    streams = pair_for(sequence, case)
    with torch.no_grad():
        output, recording = sequence.record(streams)
        expected = sequence(streams)
    assert all(map(torch.equal, output, expected))
    with pytest.raises(RuntimeError, match="needs a pass with gradients"):
        recording.backward(output, [torch.ones_like(stream) for stream in output])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": [1]}, "`args`"),
        ({"kwargs": 3}, "`kwargs`"),
        ({"input_dtype": "float32"}, "`input_dtype`"),
        ({"is_prepared": 1}, "`is_prepared`"),
        ({"needs_input": None}, "`needs_input`"),
        ({"x": torch.zeros(4, 5)}, "`x`"),
        ({"x": "x"}, "`x`"),
    ],
)
def test_record_rejects_wrong_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CASE["mlp"].sequence(2).record(**{"x": torch.zeros(4, 6).double(), **arguments})


def test_empty_sequence_cannot_be_recorded():
    with pytest.raises(ValueError, match="needs at least one block"):
        ReversibleSequential().record(torch.zeros(2, 4))


def test_one_block_can_be_recorded():
    block = ReversibleBlock(mlp(2), mlp(2), split_dim=-1)
    output, recording = block.record(x := torch.randn(3, 4))
    inputs, _ = recording.backward(output, [torch.ones_like(stream) for stream in output])
    torch.testing.assert_close(torch.cat(inputs, -1), x)


def test_compiler_and_exporters_are_refused():
    sequence = CASE["mlp"].sequence(2)
    with pytest.raises(Exception, match="`record` cannot be compiled or exported"):
        torch.compile(lambda x: sequence.record(x)[0], backend="eager", fullgraph=True)(torch.zeros(4, 6).double())
