"""A user's family: products of sines, learned by ReLU networks of two widths."""

import torch
from torch import nn

from tasks.task import Problem, choice, mean_squared_error


def sample(generator, count):
    """Four inputs, one output."""
    x = torch.rand(count, 4, generator=generator)
    return x, torch.sin(6 * x).prod(1, keepdim=True)


def make(width):
    """A network with two hidden layers."""
    return Problem(
        f"sines-{width}",
        lambda: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)),
        sample,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=64,
        steps=300,
    )


families = {"sines": lambda generator: make(choice(generator, (16, 32)))}
