"""Statistics of sets of numbers by Deep Sets. Validation: another statistic, other sizes."""

import torch
from torch import nn

from tasks.task import Problem, choice, mean_squared_error

STATISTICS = {
    "deviation": lambda x: x.std(1, correction=0),
    "extreme": lambda x: x.abs().amax(1),
    "fourth": lambda x: x.pow(4).mean(1).pow(0.25),
    "range": lambda x: x.amax(1) - x.amin(1),
}


class DeepSets(nn.Module):
    """Zaheer et al. 2017: a function of the mean of functions."""

    def __init__(self, width, activation):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(2, width), activation(), nn.Linear(width, width), activation())
        self.all = nn.Sequential(nn.Linear(width, width), activation(), nn.Linear(width, 2))

    def forward(self, x):
        return self.all(self.each(x).mean(-2))


def make(statistic, width, activation, size):
    """A statistic of so many pairs of numbers, by network."""

    def sample(generator, count):
        scale = 0.3 + torch.rand(count, 1, 2, generator=generator)
        x = scale * torch.randn(count, size, 2, generator=generator)
        return x, STATISTICS[statistic](x)

    return Problem(
        f"sets-{statistic}-{width}-{size}",
        lambda: DeepSets(width, activation),
        sample,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=64,
        steps=400,
        ceiling=0.2,
    )


families = {
    "sets": lambda generator: make(
        choice(generator, ("deviation", "extreme", "fourth")),
        choice(generator, (24, 32, 48)),
        choice(generator, (nn.ReLU, nn.GELU)),
        choice(generator, (8, 16)),
    )
}
validation = {
    f"sets-range-{w}": (lambda w=w, a=a, n=n: make("range", w, a, n))
    for w, a, n in ((40, nn.ReLU, 12), (28, nn.GELU, 12), (56, nn.ReLU, 10))
}
