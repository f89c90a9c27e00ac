"""Multilayer perceptrons: classifiers and autoencoders."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Generator, nn

from tasks import data
from tasks.init import Sin
from tasks.task import Supervised, Task, choice, horizon, log_uniform, mean_squared_error

__all__ = [
    "ACTIVATIONS",
    "Sin",
    "autoencoder",
    "classifier",
    "mlp",
    "sample_autoencoder",
    "sample_classifier",
]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sin": Sin,
    "gelu": nn.GELU,
}


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers of the given sizes, input to output, with an activation between each two."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def classifier(name: str, source: data.Data, hidden: Sequence[int], activation: str, **settings) -> Supervised:
    """An MLP with these hidden widths that classifies `source`; settings of `Supervised`."""
    source = data.Flat(source)
    return Supervised(name, lambda: mlp([*source.shape, *hidden, source.classes], activation), source, **settings)


def autoencoder(
    name: str,
    source: data.Data,
    hidden: Sequence[int],
    activation: str,
    *,
    noise: float = 0.0,
    **settings,
) -> Supervised:
    """An MLP with the given hidden widths that reconstructs `source` from its noisy version."""
    clean = data.Reconstruct(data.Flat(source))
    sizes = [*clean.shape, *hidden, *clean.shape]
    return Supervised(
        name,
        lambda: mlp(sizes, activation),
        data.Noisy(clean, noise),
        loss=mean_squared_error,
        **settings,
    )


def sample_classifier(generator: Generator) -> Task:
    """Digits or photograph patches (64 to 768 inputs), 1 to 3 hidden layers, any activation."""
    source, widths = choice(
        generator,
        [
            (data.digits(), (16, 24, 32, 48, 64, 128)),
            (data.photos(8, (2, 3)), (16, 24, 32, 48, 64, 128)),
            (data.photos(16, (2, 4)), (16, 32, 64)),
        ],
    )
    hidden = [choice(generator, widths) for _ in range(choice(generator, (1, 2, 3)))]
    activation = choice(generator, tuple(ACTIVATIONS))
    return classifier(
        f"mlp-{activation}-{'-'.join(map(str, hidden))}",
        data.Noisy(source, log_uniform(generator, 0.1, 0.5)),
        hidden,
        activation,
        **_settings(generator),
    )


def sample_autoencoder(generator: Generator) -> Task:
    """Digits or photograph patches, a bottleneck of 8 to 24 units."""
    source = choice(generator, [data.digits(), data.photos(8, (2, 3))])
    width, code = choice(generator, (32, 48, 64)), choice(generator, (8, 16, 24))
    hidden = choice(generator, ([code], [width, code, width]))
    activation = choice(generator, tuple(ACTIVATIONS))
    return autoencoder(
        f"autoencoder-{activation}-{'-'.join(map(str, hidden))}",
        source,
        hidden,
        activation,
        noise=log_uniform(generator, 0.05, 0.3),
        **_settings(generator),
    )


def _settings(generator: Generator) -> dict:
    return {
        "batch_size": choice(generator, (32, 64, 128)),
        "steps": horizon(generator),
        "scale": log_uniform(generator, 0.5, 2.0),
    }
