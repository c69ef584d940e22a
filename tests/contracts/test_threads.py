"""Models in threads: each backward pass finds its own run, whichever thread calls it."""

import threading

import pytest
import torch

from tests.helpers import CASE, all_cases, assert_close, assert_trains_as_twin, gradients, squares, stored_twin


def run_in_threads(*functions):
    """Run all functions at once, and raise the first error."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", ["conv", "averaging", "attention"])
def test_two_threads_train_two_models(name):
    case = CASE[name]
    sequences = [case.sequence(3) for _ in range(2)]
    twins = [stored_twin(sequence) for sequence in sequences]
    x = case.input(requires_grad=False)

    def train(module):
        for _ in range(10):
            squares(module(x)).backward()

    run_in_threads(*[lambda sequence=sequence: train(sequence) for sequence in sequences])
    for sequence, twin in zip(sequences, twins, strict=True):
        train(twin)
        assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("name", ["mlp", "attention", "tied", "nested-arguments", "complex"])
def test_two_threads_train_one_model(name):
    """Plain autograd allows this for modules without state; the gradients of both threads accumulate."""
    case = CASE[name]
    sequence = case.sequence(3)
    twin = stored_twin(sequence)
    args, kwargs = case.args(), case.kwargs()
    inputs = [case.input(requires_grad=False) for _ in range(2)]

    def train(module, x):
        return [torch.autograd.grad(squares(module(x, *args, **kwargs)), list(module.parameters())) for _ in range(10)]

    results = [None, None]

    def run(index):
        results[index] = train(sequence, inputs[index])

    run_in_threads(lambda: run(0), lambda: run(1))
    for x, result in zip(inputs, results, strict=True):
        assert_close(result, train(twin, x))


@all_cases
def test_backward_in_another_thread_than_forward(case):
    def step(module, x, args, kwargs):
        loss = squares(module(x, *args, **kwargs))
        run_in_threads(loss.backward)

    assert_trains_as_twin(case.sequence(3), case, step)


def test_forward_in_a_thread_that_has_ended():
    """Grad mode and autocast are thread-local; the graph is not."""

    def step(module, x, args, kwargs):
        losses = []
        run_in_threads(lambda: losses.append(squares(module(x))))
        losses[0].backward()

    assert_trains_as_twin(CASE["conv-dropout"].sequence(3), CASE["conv-dropout"], step)


def test_two_threads_differentiate_one_graph():
    """A retained graph, differentiated by two threads at once."""
    case = CASE["mlp"]
    sequence = case.sequence(4)
    twin = stored_twin(sequence)
    x = case.input()
    results = []
    loss = squares(sequence(x))

    def differentiate():
        wanted = [x, *sequence.parameters()]
        results.extend(torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(10))

    run_in_threads(differentiate, differentiate)
    expected = torch.autograd.grad(squares(twin(x)), [x, *twin.parameters()])
    for result in results:
        assert_close(result, expected)


def test_backward_without_multithreading():
    def step(module, x, args, kwargs):
        with torch.autograd.set_multithreading_enabled(False):
            squares(module(x)).backward()

    assert_trains_as_twin(CASE["conv"].sequence(3), CASE["conv"], step)
