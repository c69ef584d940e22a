from itertools import pairwise

import pytest
import torch

from revnet.training.schedules import (
    constant_rate,
    cosine_decay,
    cosine_restarts,
    linear_warmup,
    progressive_size,
    step_decay,
)


def rates(make_schedule, num_updates, **options):
    """Return the learning rate of every update, relative to the highest."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make_schedule(optimizer, num_updates=num_updates, **options)
    learning_rates = []
    for _ in range(num_updates):
        learning_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return learning_rates


def test_schedule_of_the_paper():
    learning_rates = rates(step_decay, 80, decay_at=(0.5, 0.75), decay_factor=0.1)
    assert learning_rates == pytest.approx([1] * 40 + [0.1] * 20 + [0.01] * 20)


def test_short_run_may_decay_twice_at_once():
    assert rates(step_decay, 2, decay_at=(0.5, 0.55), decay_factor=0.1) == pytest.approx([1, 0.01])


def test_first_update_has_the_full_rate():
    assert rates(step_decay, 1, decay_at=(0.1, 0.5), decay_factor=0.1) == [1]


def test_steps_after_a_warm_up():
    learning_rates = rates(step_decay, 10, decay_at=(0.5,), decay_factor=0.1, warmup=0.3)
    assert learning_rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_cosine_after_a_warm_up():
    learning_rates = rates(cosine_decay, 10, warmup=0.2)
    assert learning_rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert learning_rates[6] == pytest.approx(0.5), "halfway down"
    assert all(later < earlier for earlier, later in pairwise(learning_rates[2:]))
    assert 0 < learning_rates[-1] < 0.05, "the last update still learns"


def test_cosine_without_a_warm_up_starts_at_the_top():
    assert rates(cosine_decay, 4) == pytest.approx([1, 0.8535534, 0.5, 0.1464466])


def test_constant_rate_after_a_warm_up():
    assert rates(constant_rate, 5, warmup=0.4) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_cosine_restarts_from_the_highest_rate():
    assert rates(cosine_restarts, 8, num_cycles=2) == pytest.approx(2 * rates(cosine_decay, 4))


def test_cycles_may_grow_after_a_warm_up():
    learning_rates = rates(cosine_restarts, 16, num_cycles=3, cycle_growth=2, warmup=0.125)
    expected = [1 / 3, 2 / 3, *rates(cosine_decay, 2), *rates(cosine_decay, 4), *rates(cosine_decay, 8)]
    assert learning_rates == pytest.approx(expected)


def test_more_cycles_than_updates():
    assert rates(cosine_restarts, 2, num_cycles=5) == pytest.approx([1, 1])


def test_warm_up_leaves_the_rate_alone_afterwards():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = linear_warmup(optimizer, num_updates=10, warmup=0.3)
    learning_rates = []
    for update in range(6):
        learning_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if update == 3:
            optimizer.param_groups[0]["lr"] *= 0.1
    assert learning_rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 0.1, 0.1])


def test_images_grow_by_four_pixels_up_to_their_size():
    sizes = [progressive_size(step / 10, start_size=20, full_size=32, full_size_at=0.6) for step in range(10)]
    assert sizes == [20, 20, 24, 24, 28, 28, 32, 32, 32, 32]
    assert progressive_size(0.9, start_size=30, full_size=33, full_size_at=1.0) == 30
    assert progressive_size(1.0, start_size=30, full_size=33, full_size_at=1.0) == 33, "never larger than the images"
