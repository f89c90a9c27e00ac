"""Seven regressions without noise, which VALID lacks, two of them by SIRENs: fresh points at every step.

    export PYTHONPATH=experiments/23-thin-matrices
    PYTHONPATH=experiments/23-thin-matrices python experiments/28-longer-momentum/constants.py \
      --suite regressions:SUITE --rule whitened_polar auto_lr.RATE=0.03 whitened_polar.ITERATIONS=5
    python -m meta_train evaluate --suite regressions:SUITE --out runs/regressions \
      --optimizers auto_lr=nfn:auto_lr whitened_polar=nfn:whitened_polar muon-cosine adamw-cosine
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from tasks import fields
from tasks.mlp import mlp
from tasks.task import Problem, mean_squared_error


def waves(fan_in: int, fan_out: int) -> Callable[[Tensor], Tensor]:
    """A fixed sum of twelve plane waves, of variance about 1."""
    g = torch.Generator().manual_seed(5)
    k, phase = 2.0 * torch.randn(fan_in, 12, generator=g), 6.28 * torch.rand(12, generator=g)
    height = torch.randn(12, fan_out, generator=g) / 12**0.5 * 1.4
    return lambda x: torch.sin(x @ k + phase) @ height


def teacher(fan_in: int, fan_out: int) -> Callable[[Tensor], Tensor]:
    """A fixed network of 32 ReLUs."""
    g = torch.Generator().manual_seed(3)
    first, last = torch.randn(fan_in, 32, generator=g) / fan_in**0.5, torch.randn(32, fan_out, generator=g) / 4
    return lambda x: torch.relu(x @ first) @ last


def regression(target: Callable, sizes: list[int], activation: str, batch_size: int, steps: int) -> Problem:
    """An MLP that learns the function from its values."""
    function = target(sizes[0], sizes[-1])

    def sample(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        shape = (count, sizes[0])
        if target is teacher:
            x = torch.randn(shape, generator=generator)
        else:
            x = 2 * torch.rand(shape, generator=generator) - 1
        return x, function(x)

    return Problem(
        f"{target.__name__}-{activation}",
        lambda: mlp(sizes, activation),
        sample,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=batch_size,
        steps=steps,
    )


def siren(speed: float, width: int, depth: int) -> Problem:
    """A SIREN that learns a fixed sum of 24 fast plane waves on a square."""
    g = torch.Generator().manual_seed(7)
    k, phase = speed * torch.randn(2, 24, generator=g), 6.28 * torch.rand(24, generator=g)
    height = torch.randn(24, 2, generator=g) / 24**0.5

    def sample(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        x = 2 * torch.rand(count, 2, generator=generator) - 1
        return x, torch.sin(x @ k + phase) @ height

    return Problem(
        f"siren-{speed:g}",
        lambda: fields.siren(2, 2, width=width, depth=depth),
        sample,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=512,
        steps=500,
    )


SUITE = {
    "waves-tanh": partial(regression, waves, [2, 48, 48, 48, 1], "tanh", 256, 1000),
    "waves-gelu": partial(regression, waves, [3, 64, 64, 2], "gelu", 128, 1000),
    "waves-relu": partial(regression, waves, [4, 64, 64, 1], "relu", 128, 600),
    "waves-sin": partial(regression, waves, [2, 48, 48, 1], "sin", 128, 600),
    "teacher-relu": partial(regression, teacher, [16, 64, 64, 4], "relu", 128, 800),
    "siren-12": partial(siren, 12.0, 48, 3),
    "siren-20": partial(siren, 20.0, 64, 2),
}
