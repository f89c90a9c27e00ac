"""Sums of two marked numbers of a sequence, by GRUs. Validation: products, other lengths and widths."""

import torch
from torch import nn

from tasks.recurrent import Recurrent
from tasks.task import Problem, choice, mean_squared_error


def make(width, length, product=False):
    """A reader of sequences of so many numbers, two of them marked."""

    def sample(generator, count):
        value = torch.rand(count, length, generator=generator)
        where = torch.rand(count, length, generator=generator).topk(2, -1).indices
        mark = torch.zeros_like(value).scatter(1, where, 1.0)
        chosen = value.gather(1, where)
        y = 4 * chosen.prod(1, keepdim=True) if product else chosen.sum(1, keepdim=True)
        return torch.stack([value, mark], -1), y

    return Problem(
        f"adding-{width}-{length}",
        lambda: Recurrent(nn.Identity(), 2, 1, kind="gru", width=width, depth=1, last=True),
        sample,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=64,
        steps=400,
        ceiling=1 / 6,
    )


families = {"adding": lambda generator: make(choice(generator, (16, 24, 32)), choice(generator, (6, 8, 10)))}
validation = {
    f"multiplying-{w}-{n}": (lambda w=w, n=n: make(w, n, product=True)) for w, n in ((20, 7), (28, 9), (40, 8))
}
