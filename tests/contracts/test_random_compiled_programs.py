"""Random sequences, compiled as a whole, and random autograd calls give the results of their stored twins.

`make test-slow` runs all slow tests. To run this file alone and print the share of rejected programs:

    python -m pytest -m slow -rP --show-capture=stdout tests/contracts/test_random_compiled_programs.py
"""

import copy
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from revnet import Reverse, ReversibleBlock, ReversibleSequential
from tests.contracts.random_programs import COUPLINGS, Averaged, draw_inputs, draw_sequence, run_program
from tests.helpers import assert_close, stored_twin

pytestmark = [
    # PyTorch triggers its own warning when it traces a custom `autograd.Function`.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

HOOKS_MESSAGE = "has hooks or a `forward` of its own, which a compiled reversible sequence does not call"
IN_PLACE_MESSAGE = "one of the variables needed for gradient computation has been modified by an inplace operation"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    # By default, Inductor draws different random numbers from an uncompiled run.
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def is_hooked(sequence: ReversibleSequential) -> bool:
    """Return whether a block has a hook or a `forward` of its own."""
    return any(type(block) is not ReversibleBlock or block._forward_hooks for block in sequence)


def shares_buffers(sequence: ReversibleSequential) -> bool:
    """Return whether a function with buffers is part of a stored block and of a reversed one."""
    buffers = {True: set(), False: set()}
    for block, policy in zip(sequence, sequence.policies, strict=True):
        buffers[isinstance(policy, Reverse)] |= set(block.buffers())
    return bool(buffers[True] & buffers[False])


def expect_no_double_backward(penalty, inputs):
    """Check that PyTorch refuses second derivatives of a compiled graph, as it does for every graph."""
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(penalty, inputs, retain_graph=True, allow_unused=True)
    return []


def run_compiled(sequence: ReversibleSequential, inputs: list, seed: int, backend: str) -> list[Tensor | None]:
    torch._dynamo.reset()
    compiled = torch.compile(sequence, backend=backend, fullgraph=True)
    return run_program(sequence, inputs, seed, call=compiled, differentiate_again=expect_no_double_backward)


def can_be_compiled(twin: ReversibleSequential, inputs: list, seed: int, backend: str) -> bool:
    """Return whether PyTorch compiles the stored twin, which consists of its own operators."""
    try:
        run_compiled(twin, inputs, seed, backend)
    except RuntimeError as error:
        if IN_PLACE_MESSAGE not in str(error):
            raise
        return False
    return True


def check_program(seed: int, backend: str) -> str | None:
    """Compare a compiled program with its stored twin; return why it is refused, or None if it ran."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    couplings = [coupling for coupling in COUPLINGS if not coupling.remembers]  # These cannot be compiled.
    sequence = draw_sequence(draw, couplings=couplings)
    for module in sequence.modules():
        if isinstance(module, Averaged):
            module.copies = True  # otherwise some graphs keep the matrix and others its values
    twin = stored_twin(sequence)
    inputs = draw_inputs(draw)
    twin_inputs = copy.deepcopy(inputs)
    try:
        observed = run_compiled(sequence, inputs, seed, backend)
    except Exception as error:  # the compiler's errors differ between releases
        if is_hooked(sequence) and HOOKS_MESSAGE in str(error):
            return "hooks"
        if IN_PLACE_MESSAGE in str(error) and shares_buffers(sequence):
            return "buffers of stored and reversed blocks"
        if IN_PLACE_MESSAGE in str(error) and not can_be_compiled(twin, twin_inputs, seed, backend):
            return "PyTorch refuses the stored twin"
        raise
    assert not is_hooked(sequence), seed
    expected = run_program(twin, twin_inputs, seed, differentiate_again=lambda penalty, inputs: [])
    assert len(observed) == len(expected), seed
    for value, expected_value in zip(observed, expected, strict=True):
        if expected_value is None and value is not None:
            # Compiled graphs return zeros for missing gradients, even without revnet.
            expected_value = torch.zeros_like(value)
        assert_close(value, expected_value, tolerance=1e-7)
    return None


def check_programs(num_programs: int, first_seed: int, backend: str) -> None:
    """Check programs until `num_programs` of them have run, and print how many were refused."""
    results: Counter[str | None] = Counter()
    seed = first_seed
    while results[None] < num_programs:
        assert seed < first_seed + 20 * num_programs, results
        results[check_program(seed, backend)] += 1
        seed += 1
    num_refused = results.total() - results[None]
    reasons = ", ".join(f"{reason}: {count}" for reason, count in results.items() if reason is not None)
    share = num_refused / results.total()
    print(
        f"{backend}: {results[None]} programs ran; {num_refused} of {results.total()} ({share:.0%}) refused ({reasons})"
    )


def test_compiled_random_program():
    check_programs(4, first_seed=0, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(1000, 11_000, 1000))
def test_two_hundred_compiled_random_programs(first_seed):
    check_programs(20, first_seed, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(20_000, 25_000, 1000))
def test_forty_random_programs_in_inductor(first_seed):
    check_programs(8, first_seed, "inductor")
