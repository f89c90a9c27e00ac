"""A function of four numbers, learned by ReLU networks. Validation: another function, other widths."""

import torch
from torch import nn

from tasks.task import Problem, choice, mean_squared_error


def make(width, phase=0.0, steps=500):
    """A product of four sines, by network."""

    def sample(generator, count):
        x = torch.rand(count, 4, generator=generator)
        return x, torch.sin(6 * x + phase).prod(1, keepdim=True)

    return Problem(
        f"sines-{width}",
        lambda: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)),
        sample,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=64,
        steps=steps,
    )


families = {"sines": lambda generator: make(choice(generator, (16, 32, 64)))}
validation = {f"sines-{w}": (lambda w=w: make(w, phase=1.0)) for w in (24, 48, 80)}
