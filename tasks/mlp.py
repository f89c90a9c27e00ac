"""Multilayer perceptrons: classifiers and autoencoders."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Generator, Tensor, nn

from tasks import data
from tasks.init import Sin
from tasks.task import Supervised, Task, choice, horizon, log_uniform, mean_squared_error

__all__ = [
    "ACTIVATIONS",
    "COMMON",
    "Gated",
    "Sin",
    "autoencoder",
    "classifier",
    "gated",
    "mlp",
    "sample_autoencoder",
    "sample_classifier",
    "sample_inputs",
]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sin": Sin,
    "gelu": nn.GELU,
    "linear": nn.Identity,
    "softsign": nn.Softsign,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}
COMMON = ("relu", "leaky", "tanh", "sin", "gelu")
"""Those that the families `sample_classifier` and `sample_autoencoder` draw from."""


class Gated(nn.Module):
    """a * act(b), where a and b are two linear maps of the input, in one matrix a | b (Shazeer 2020, "GLU Variants").

    With act "linear" the units scale by any number, positive or negative.
    """

    def __init__(self, fan_in: int, width: int, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(fan_in, 2 * width)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.linear(x).chunk(2, -1)
        return a * self.act(b)


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
    activation = choice(generator, COMMON)
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
    activation = choice(generator, COMMON)
    return autoencoder(
        f"autoencoder-{activation}-{'-'.join(map(str, hidden))}",
        source,
        hidden,
        activation,
        noise=log_uniform(generator, 0.05, 0.3),
        **_settings(generator),
    )


def gated(name: str, source: data.Data, hidden: Sequence[int], activation: str, **settings) -> Supervised:
    """A classifier of `source` whose hidden layers are `Gated`; settings of `Supervised`."""
    source = data.Flat(source)
    sizes = [*source.shape, *hidden]

    def build() -> nn.Sequential:
        layers = [Gated(a, b, activation) for a, b in pairwise(sizes)]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], source.classes))

    return Supervised(name, build, source, **settings)


def sample_inputs(generator: Generator) -> Task:
    """192 to 768 inputs (photograph patches of 8 to 16 pixels), 1 to 3 hidden layers, every activation, also gated."""
    source = data.photos(choice(generator, (8, 10, 12, 14, 16)), choice(generator, ((2, 3), (2, 4))))
    hidden = [choice(generator, (16, 24, 32, 64)) for _ in range(choice(generator, (1, 2, 2, 3)))]
    make, kind = choice(generator, ((classifier, "mlp"), (classifier, "mlp"), (classifier, "mlp"), (gated, "gated")))
    activation = choice(generator, tuple(ACTIVATIONS))
    return make(
        f"{kind}-{source.size}-{activation}-{'-'.join(map(str, hidden))}",
        data.Noisy(source, log_uniform(generator, 0.1, 0.5)),
        hidden,
        activation,
        **_settings(generator),
    )


def _settings(generator: Generator) -> dict:
    return {
        "batch_size": choice(generator, (32, 64, 128)),
        "steps": horizon(generator),
        "scale": log_uniform(generator, 0.5, 2.0),
    }
