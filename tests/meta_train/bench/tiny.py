"""Tiny tasks, a suite of them by name as workers find it, and curves with known answers."""

import torch
from torch import nn
from torch.func import functional_call

from meta_train.bench.curves import Curve
from meta_train.bench.evaluate import evaluate

ME = "tests.meta_train.bench.tiny:SUITE"


class Quadratic:
    """Loss 1/2 sum_k a_k w_k^2 with noise on the gradient; SGD is stable up to lr = 2 / max(a)."""

    def __init__(self, name: str = "quadratic", noise: float = 0.0, steps: int = 40):
        self.name, self.noise, self.steps, self.ceiling = name, noise, steps, 10.0
        self.model = nn.Linear(3, 1, bias=False)
        self.curvature = torch.tensor([1.0, 0.5, 0.25])

    def init(self, generator):
        return {"weight": torch.randn(1, 3, generator=generator)}

    def batch(self, generator):
        return (self.noise * torch.randn(1, 3, generator=generator),)

    def train_eval(self):
        return (torch.zeros(1, 3),)

    held_out = train_eval

    def loss(self, params, batch):
        w = params["weight"]
        return (0.5 * self.curvature * w**2 + batch[0] * w).sum()


class Regression:
    """A small network with hidden matrices on fixed data."""

    name, steps, ceiling = "regression", 30, 4.0

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.x = torch.randn(96, 4, generator=torch.Generator().manual_seed(7))
        self.y = torch.sin(self.x[:, :2]) * self.x[:, 2:]

    def init(self, generator):
        return {
            name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
            for name, p in self.model.named_parameters()
        }

    def batch(self, generator):
        rows = torch.randint(64, (16,), generator=generator)
        return self.x[rows], self.y[rows]

    def train_eval(self):
        return self.x[:64], self.y[:64]

    def held_out(self):
        return self.x[64:], self.y[64:]

    def loss(self, params, batch):
        x, y = batch
        return (functional_call(self.model, params, (x,)) - y).square().mean()


class Lowered(Regression):
    """Its loss falls below zero, like that of densities."""

    def __init__(self, by=0.5, ceiling=4.0):
        super().__init__()
        self.by, self.ceiling = by, ceiling

    def loss(self, params, batch):
        return super().loss(params, batch) - self.by


SUITE = {
    "quadratic": Quadratic,
    "noisy": lambda: Quadratic("noisy", noise=0.3),
    "regression": Regression,
}
FAMILIES = {"drawn": lambda generator: Quadratic()}
LIST = [Quadratic]
GRIDS = {"adam": (1e-2, 1e-1), "sgdm": (1e-2, 1e-1), "adamw-cosine": (1e-2, 1e-1)}


def measure(out, optimizers=("sgdm",), **options):
    options = {"suite": ME, "tasks": ["quadratic"], "seeds": 2, "grids": GRIDS, **options}
    return evaluate(list(optimizers), out, say=lambda line: None, **options)


def curve(losses, every=10, diverged=False):
    at = [every * k for k in range(len(losses))]
    losses = list(losses)
    return Curve(at, losses, losses, seconds=1, cpu_seconds=1, ran=at[-1], diverged=diverged)
