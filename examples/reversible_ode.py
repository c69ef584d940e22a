# A reversible ODE: learn the force of a pendulum from observed positions, through 1,000 leapfrog steps.
# All steps share one network, so depth costs no parameters; reversal makes it cost no activations either.
# Run: python examples/reversible_ode.py
import torch
from torch import nn

import revnet
from revnet.nn import LeapfrogBlock

NUM_STEPS, TIME = 1000, 5.0
step = TIME / NUM_STEPS


class Force(nn.Module):
    """The acceleration, as a function of the position."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x):
        return self.layers(x)


class Pendulum(nn.Module):
    """The true acceleration."""

    def forward(self, x):
        return -x.sin()


def solver(force, num_steps):
    blocks = [LeapfrogBlock(force, step_size=step, split_dim=1) for _ in range(num_steps)]
    return revnet.ReversibleSequential(*blocks)


def main():
    torch.manual_seed(0)
    start = torch.linspace(-2.5, 2.5, 32)[:, None]  # positions; the pendulum starts at rest
    # Observed four times on the way. LeapfrogBlock carries `v * step` as its second stream.
    pieces, true, observed = 4, Pendulum(), []
    with torch.no_grad():
        state = (start, torch.zeros_like(start))
        for _ in range(pieces):
            state = solver(true, NUM_STEPS // pieces)(state)
            observed.append(state[0])
    force = Force()
    flow = solver(force, NUM_STEPS // pieces)
    optimizer = torch.optim.Adam(force.parameters(), lr=0.01)
    for update in range(1, 101):
        state, loss = (start, torch.zeros_like(start)), 0.0
        for position in observed:
            state = flow(state)
            loss = loss + nn.functional.mse_loss(state[0], position)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 20 == 0:
            print(f"update {update}: loss {loss.item():.5f}", flush=True)
    angles = torch.linspace(-2, 2, 9)[:, None]
    error = (force(angles) - true(angles)).abs().max().item()
    print(f"largest error of the learned force between -2 and 2: {error:.3f}")
    for num_steps in (10, NUM_STEPS):
        model, bytes_of = solver(force, num_steps), {}
        for policy in ("reverse", "store"):
            revnet.set_policy(model, policy)
            state = (start.clone().requires_grad_(), torch.zeros_like(start))
            bytes_of[policy] = revnet.memory.predict(model, state).activation_bytes
        print(f"{num_steps} steps: {bytes_of['reverse']:,} bytes reversed, {bytes_of['store']:,} stored")


if __name__ == "__main__":
    main()
