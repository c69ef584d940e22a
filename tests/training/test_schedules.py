import torch

from revnet.training.schedules import step_decay


def make_optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def test_the_papers_schedule():
    schedule = step_decay(make_optimizer(), num_updates=80_000, decay_at=(0.5, 0.75), decay_factor=0.1)
    assert dict(schedule.milestones) == {40_000: 1, 60_000: 1}


def test_the_rate_falls_at_the_update_itself():
    optimizer = make_optimizer()
    schedule = step_decay(optimizer, num_updates=8, decay_at=(0.5, 0.75), decay_factor=0.1)
    rates = []
    for _ in range(8):
        rates.append(round(optimizer.param_groups[0]["lr"], 12))
        optimizer.step()
        schedule.step()
    assert rates == [0.1] * 4 + [0.01] * 2 + [0.001] * 2


def test_a_short_run_may_fall_twice_at_once():
    optimizer = make_optimizer()
    schedule = step_decay(optimizer, num_updates=1, decay_at=(0.6, 0.75), decay_factor=0.1)
    optimizer.step()
    schedule.step()
    assert round(optimizer.param_groups[0]["lr"], 12) == 0.001
