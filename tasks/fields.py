"""Networks of coordinates: fitting a photograph by sines, and a partial differential equation."""

import functools
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from sklearn import datasets
from torch import Generator, Tensor, nn
from torch.func import jvp

from tasks.data import Batch, Rows
from tasks.mlp import mlp
from tasks.task import Problem, mean_squared_error

# ------------------------------------------------------------------------------------------- sines


class SineLayer(nn.Linear):
    """sin(omega (W x + b)), initialised as in Sitzmann et al. 2020, "Implicit Neural Representations with Periodic
    Activation Functions", section 3.2."""

    def __init__(self, fan_in: int, fan_out: int, omega: float, first: bool) -> None:
        super().__init__(fan_in, fan_out)
        self.omega = omega
        bound = 1 / fan_in if first else math.sqrt(6 / fan_in) / omega
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * super().forward(x))


def siren(fan_in: int, fan_out: int, *, width: int, depth: int, omega: float = 30.0) -> nn.Sequential:
    """`depth` layers of `width` sines and a linear one."""
    sizes = [fan_in] + depth * [width]
    layers = [SineLayer(a, b, omega, first=i == 0) for i, (a, b) in enumerate(pairwise(sizes))]
    last = nn.Linear(width, fan_out)
    bound = math.sqrt(6 / width) / omega
    nn.init.uniform_(last.weight, -bound, bound)
    return nn.Sequential(*layers, last)


@functools.cache
def pixels(side: int) -> Rows:
    """A square of scikit-learn's photograph of a temple: x [n, 2] in [-1, 1], y [n, 3] colours in [-1, 1].

    Every ninth pixel is held out: one of every 3 x 3.
    """
    photograph = datasets.load_sample_images().images[0][100 : 100 + side, 200 : 200 + side]
    colours = torch.tensor(np.ascontiguousarray(photograph)).float() / 127.5 - 1
    line = torch.linspace(-1, 1, side)
    x = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    held = torch.zeros(side, side, dtype=torch.bool)
    held[1::3, 1::3] = True
    return Rows(x[~held], colours[~held], x[held], colours[held], 0)


def picture(name: str, source: Rows, *, width: int, depth: int, batch_size: int, steps: int) -> Problem:
    """A `siren` from the coordinates of a pixel to its colour."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mean_squared_error(model(x), y)

    return Problem(
        name,
        lambda: siren(2, 3, width=width, depth=depth),
        source.sample,
        loss,
        batch_size=batch_size,
        steps=steps,
        held_out=source.held_out,
        ceiling=float(source.y.var(0, correction=0).mean()),
    )


# ------------------------------------------------------------------------------------- an equation


def burgers_points(generator: Generator, count: int) -> Batch:
    """Uniform points (x, t) [count, 3, 2]: inside [-1, 1] x [0, 1], at time 0, and at one of the two ends."""
    x, t = 2 * torch.rand(count, 3, generator=generator) - 1, torch.rand(count, 3, generator=generator)
    inside = torch.stack([x[:, 0], t[:, 0]], -1)
    start = torch.stack([x[:, 1], torch.zeros(count)], -1)
    end = torch.stack([torch.sign(x[:, 2]), t[:, 2]], -1)
    return (torch.stack([inside, start, end], 1),)


def burgers_residual(u: Callable[[Tensor], Tensor], points: Tensor, viscosity: float) -> Tensor:
    """u_t + u u_x - viscosity u_xx of u: [n, 2] -> [n, 1] at points (x, t) [n, 2], by forward derivatives; [n, 1]."""
    along_x, along_t = (axis.to(points).expand_as(points) for axis in torch.eye(2))

    def u_and_u_x(at: Tensor) -> tuple[Tensor, ...]:
        return jvp(u, (at,), (along_x,))

    (value, u_x), (_, u_xx) = jvp(u_and_u_x, (points,), (along_x,))[:2]
    u_t = jvp(u, (points,), (along_t,))[1]
    return u_t + value * u_x - viscosity * u_xx


def burgers(
    name: str, *, width: int, depth: int, batch_size: int, steps: int, viscosity: float = 0.05, weight: float = 5.0
) -> Problem:
    """A physics-informed network for Burgers' equation from -sin(pi x) with zero ends (Raissi et al. 2019).

    The loss is the mean squared residual inside, plus `weight` times the squared errors at time 0 and at the ends;
    held out are other points. The network has `depth` layers of tanh.
    """

    def loss(model: nn.Module, points: Tensor) -> Tensor:
        inside, start, end = points.unbind(-2)
        residual = burgers_residual(model, inside, viscosity)
        begin = model(start) + torch.sin(math.pi * start[..., :1])
        return residual.square().mean() + weight * (begin.square().mean() + model(end).square().mean())

    return Problem(
        name,
        lambda: mlp([2] + depth * [width] + [1], "tanh"),
        burgers_points,
        loss,
        batch_size=batch_size,
        steps=steps,
        ceiling=weight * 0.5,  # of u = 0
    )
