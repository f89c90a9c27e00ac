"""Systems that move: a field fitted to trajectories, an operator between functions, and values of states."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from tasks.data import Batch
from tasks.held_out.layers import dense, shrunk
from tasks.task import Problem, mean_squared_error


def runge_kutta(rate: Callable[[Tensor], Tensor], x: Tensor, dt: float) -> Tensor:
    """One classical step of fourth order."""
    k1 = rate(x)
    k2 = rate(x + dt / 2 * k1)
    k3 = rate(x + dt / 2 * k2)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + rate(x + dt * k3))


# ----------------------------------------------------------------------------------------- neurons

NEURONS, TIMES, GAP = 3, 8, 0.6
TRAJECTORIES, OTHERS = 1500, 500


def neuron_rate(state: Tensor) -> Tensor:
    """FitzHugh and Nagumo's neurons in a ring, each driven by the one before: [..., 2 NEURONS] voltages, recoveries."""
    v, w = state.chunk(2, -1)
    return torch.cat([v - v.pow(3) / 3 - w + 0.5 + 0.4 * (v.roll(1, -1) - v), 0.3 * (v + 0.7 - 0.8 * w)], -1)


@functools.cache
def trajectories() -> Tensor:
    """From random states, at TIMES + 1 times GAP apart, [n, TIMES + 1, 2 NEURONS]."""
    g = Generator().manual_seed(0)
    size = torch.tensor([1.6, 0.8]).repeat_interleave(NEURONS)
    x = size * torch.randn(TRAJECTORIES + OTHERS, 2 * NEURONS, generator=g).clamp(-2, 2)
    states = [x]
    for _ in range(TIMES):
        for _ in range(20):
            x = runge_kutta(neuron_rate, x, GAP / 20)
        states.append(x)
    return torch.stack(states, 1)


class Flow(nn.Module):
    """Chen et al. 2018, "Neural Ordinary Differential Equations": the rate of change is a network, which is followed by
    two Runge-Kutta steps from each time to the next. Start states [B, d] -> states [B, TIMES, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rate = dense([2 * NEURONS, width, width, 2 * NEURONS], nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        states = []
        for _ in range(TIMES):
            for _ in range(2):
                x = runge_kutta(self.rate, x, GAP / 2)
            states.append(x)
        return torch.stack(states, -2)


def ode_neurons() -> Problem:
    """Trajectories of three neurons, by absolute errors through the solver; other start states are held out."""
    states = trajectories()

    def sample(generator: Generator, count: int) -> Batch:
        x = states[torch.randint(TRAJECTORIES, (count,), generator=generator)]
        return x[:, 0], x[:, 1:]

    return Problem(
        "ode-neurons",
        lambda: Flow(52),
        sample,
        lambda model, x, y: (model(x) - y).abs().mean(),
        batch_size=32,
        steps=800,
        held_out=lambda: (states[TRAJECTORIES:, 0], states[TRAJECTORIES:, 1:]),
        eval_size=500,
    )


# ---------------------------------------------------------------------------------- growing fronts

SENSORS, POINTS, VISCOSITY, GROWTH = 48, 24, 0.004, 0.02


def fronts(generator: Generator, count: int) -> Batch:
    """Start functions on the circle and points, and the solutions there of h_t = VISCOSITY h_xx + GROWTH h_x^2 / 2.

    x [count, SENSORS + 2 POINTS]: the start at SENSORS places, then places and times in [0, 1]. y [count, POINTS].
    Exact by Hopf and Cole: exp(h GROWTH / (2 VISCOSITY)) obeys the heat equation.
    """
    k = torch.arange(1, 7)
    waves = torch.randn(2, count, 6, generator=generator) / k.pow(1.5)
    phase = 2 * math.pi * torch.outer(torch.arange(SENSORS) / SENSORS, k.float())
    start = waves[0] @ torch.cos(phase).T + waves[1] @ torch.sin(phase).T
    place, time = torch.rand(2, count, POINTS, generator=generator)
    ratio = GROWTH / (2 * VISCOSITY)
    modes = torch.fft.rfft(torch.exp(ratio * start), norm="forward")
    number = 2 * math.pi * torch.arange(modes.shape[-1])
    fade = torch.exp(-VISCOSITY * number.square() * time.unsqueeze(-1))
    turn = torch.exp(1j * number * place.unsqueeze(-1))
    twice = torch.where((number > 0) & (number < math.pi * SENSORS), 2.0, 1.0)
    heat = (twice * modes.unsqueeze(1) * fade * turn).real.sum(-1)
    return torch.cat([start, place, time], -1), torch.log(heat.clamp(min=1e-3)) / ratio


class Operator(nn.Module):
    """Lu et al. 2021, "Learning Nonlinear Operators via DeepONet": the value at a point is the inner product of a
    network of the function and a network of the point, plus a number. [B, SENSORS + 2 POINTS] -> [B, POINTS]"""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.branch = dense([SENSORS, width, width, features], nn.Tanh)
        self.trunk = dense([5, width, width, features], nn.Tanh)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        start, place, time = x.split([SENSORS, POINTS, POINTS], -1)
        angle = 2 * math.pi * place
        seen = torch.stack([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin(), time], -1)
        return (self.trunk(seen) * self.branch(start).unsqueeze(-2)).sum(-1) + self.shift


def deeponet_fronts() -> Problem:
    """From a start function to its later values."""
    return Problem(
        "stream-deeponet-fronts",
        lambda: Operator(92, 68),
        fronts,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=32,
        steps=1500,
    )


# -------------------------------------------------------------------------------------------- cart

TICK, DISCOUNT, TRANSITIONS, OTHER_TRANSITIONS = 0.05, 0.9, 8000, 1000
LIMITS = torch.tensor([2.4, 3.0, 0.6, 3.0])  # of place, speed, angle and angular speed where states are drawn


def push(state: Tensor, action: Tensor) -> Tensor:
    """The cart and its pole [n, 4] a TICK after a push of -10 or 10 (Barto et al. 1983), by Euler's rule."""
    place, speed, angle, turning = state.unbind(-1)
    force = 20.0 * action - 10
    pole = 0.1 * 0.5  # mass times half the length
    common = (force + pole * turning.square() * angle.sin()) / 1.1
    faster = (9.8 * angle.sin() - angle.cos() * common) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
    pull = common - pole * faster * angle.cos() / 1.1
    return torch.stack(
        [place + TICK * speed, speed + TICK * pull, angle + TICK * turning, turning + TICK * faster], -1
    )


@functools.cache
def transitions() -> Batch:
    """State, action, reward, next state and whether it goes on: an upright pole in the middle is worth most."""
    g = Generator().manual_seed(0)
    count = TRANSITIONS + OTHER_TRANSITIONS
    state = LIMITS * (2 * torch.rand(count, 4, generator=g) - 1)
    action = torch.randint(2, (count,), generator=g)
    after = push(state, action)
    on = ((after[:, 0].abs() < LIMITS[0]) & (after[:, 2].abs() < LIMITS[2])).float()
    reward = on * (1 - (after[:, 2] / LIMITS[2]).square() - 0.3 * (after[:, 0] / LIMITS[0]).square()) - (1 - on)
    return state / LIMITS, action, reward, after / LIMITS, on


class Dueling(nn.Module):
    """Wang et al. 2016, "Dueling Network Architectures": states [B, 4] -> values [B, 2] of both actions, the value of
    the state plus the advantages less their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(dense([4, width, width], nn.ReLU), nn.ReLU())
        self.value = shrunk(dense([width, 44, 1], nn.ReLU), 0.1)
        self.advantage = dense([width, 44, 2], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        advantage = self.advantage(h)
        return self.value(h) + advantage - advantage.mean(-1, keepdim=True)


def bellman_cart() -> Problem:
    """The squared Bellman error of a cart with a pole on a fixed buffer (Baird 1995, "Residual Algorithms"); both
    sides of the equation are differentiated, so that it is one loss."""
    buffer = transitions()

    def sample(generator: Generator, count: int) -> Batch:
        i = torch.randint(TRANSITIONS, (count,), generator=generator)
        return tuple(part[i] for part in buffer)

    def loss(model: nn.Module, state: Tensor, action: Tensor, reward: Tensor, after: Tensor, on: Tensor) -> Tensor:
        taken = model(state).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return (taken - reward - DISCOUNT * on * model(after).amax(-1)).square().mean()

    return Problem(
        "bellman-cart",
        lambda: Dueling(84),
        sample,
        loss,
        batch_size=128,
        steps=1500,
        held_out=lambda: tuple(part[TRANSITIONS:] for part in buffer),
    )
