"""Reinforcement learning in miniature: swinging up a pendulum whose dynamics can be differentiated."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from tasks.data import Batch
from tasks.mlp import mlp
from tasks.task import Problem

GRAVITY, STEP = 10.0, 0.05


class Policy(nn.Module):
    """From states (angle from upright, angular velocity) [..., 2] to a torque [..., 1] of at most `strength`."""

    def __init__(self, width: int, depth: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.net = mlp([3] + depth * [width] + [1], "tanh")

    def forward(self, state: Tensor) -> Tensor:
        angle, velocity = state[..., :1], state[..., 1:]
        seen = torch.cat([torch.cos(angle), torch.sin(angle), velocity / 4], -1)
        return self.strength * torch.tanh(self.net(seen))


def swing(state: Tensor, torque: Tensor) -> Tensor:
    """The pendulum (a rod of mass and length 1) one time step later: states [..., 2], torques [..., 1]."""
    angle, velocity = state[..., :1], state[..., 1:]
    velocity = velocity + STEP * (1.5 * GRAVITY * torch.sin(angle) + 3 * torque)
    return torch.cat([angle + STEP * velocity, velocity], -1)


def cost(state: Tensor, torque: Tensor) -> Tensor:
    """Being away from upright, moving and pushing, [...]: at most 5 for a slow pendulum."""
    angle, velocity = state[..., 0], state[..., 1]
    return (
        2 * (1 - torch.cos(angle))
        + 0.1 * velocity.square() / (1 + 0.01 * velocity.square())
        + 0.01 * torque[..., 0].square()
    )


def starts(generator: Generator, count: int) -> Batch:
    """Any angle, slow: states [count, 2]."""
    u = 2 * torch.rand(count, 2, generator=generator) - 1
    return (u * torch.tensor([math.pi, 1.0]),)


def rollout_cost(policy: Callable[[Tensor], Tensor], state: Tensor, length: int) -> Tensor:
    """Mean cost over time and over the start states of `length` steps under the policy."""
    total = torch.zeros_like(state[..., 0])
    for _ in range(length):
        torque = policy(state)
        total = total + cost(state, torque)
        state = swing(state, torque)
    return total.mean() / length


def pendulum(
    name: str, *, width: int, depth: int, length: int, batch_size: int, steps: int, strength: float = 3.0
) -> Problem:
    """Policy gradients through the simulator: the loss is the mean cost of rollouts from random states.

    The torque is too weak to lift the pendulum from rest, it has to swing. Dynamics as in Gymnasium's Pendulum.
    Held-out are other start states.
    """

    def loss(model: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        return rollout_cost(model, state, length)

    return Problem(
        name, lambda: Policy(width, depth, strength), starts, loss, batch_size=batch_size, steps=steps, eval_size=256
    )
