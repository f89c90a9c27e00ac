"""Convolutional classifiers."""

from collections.abc import Sequence

from torch import Generator, nn

from tasks import data
from tasks.mlp import ACTIVATIONS
from tasks.task import Supervised, Task, choice, horizon, log_uniform

POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


def cnn(
    shape: Sequence[int],
    channels: Sequence[int],
    classes: int,
    activation: str,
    *,
    norm: bool = False,
    pool: str = "max",
    head: str = "flatten",
    pools: int | None = None,
) -> nn.Sequential:
    """3x3 convolutions to these channels, each (normalised and) activated, then a linear head.

    shape: (channels, height, width) of the input. The first `pools` convolutions (default: all but
    the last) are followed by 2x2 pooling, "max" or "avg". head: "flatten" reads every pixel,
    "average" the mean over pixels. BatchNorm2d normalises by the batch's own statistics, always; a
    convolution before it has no bias, which would have no effect.

    Raises:
        ValueError: an unknown head.
    """
    if head not in ("flatten", "average"):
        raise ValueError(f"no head {head!r}. Choose 'flatten' or 'average'.")
    fan_in, size, _ = shape
    layers: list[nn.Module] = []
    for i, fan_out in enumerate(channels):
        layers.append(nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(fan_out, track_running_stats=False))
        layers.append(ACTIVATIONS[activation]())
        if i < (len(channels) - 1 if pools is None else pools):
            layers.append(POOLS[pool](2))
            size //= 2
        fan_in = fan_out
    if head == "average":
        layers.append(nn.AdaptiveAvgPool2d(1))
        size = 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(fan_in * size * size, classes))


def classifier(
    name: str,
    source: data.Data,
    channels: Sequence[int],
    activation: str,
    *,
    norm: bool = False,
    pool: str = "max",
    head: str = "flatten",
    pools: int | None = None,
    **settings,
) -> Supervised:
    """A `cnn` that classifies the images of `source`; settings: those of `Supervised`."""

    def build() -> nn.Sequential:
        return cnn(
            source.shape,
            channels,
            source.classes,
            activation,
            norm=norm,
            pool=pool,
            head=head,
            pools=pools,
        )

    return Supervised(name, build, source, **settings)


def sample_classifier(generator: Generator) -> Task:
    """Digits or photograph patches, 2 or 3 convolutions of 4 to 16 channels."""
    source = choice(generator, [data.digits(), data.photos(8, (2, 3))])
    channels = [choice(generator, (4, 8, 12, 16)) for _ in range(choice(generator, (2, 2, 3)))]
    activation = choice(generator, ("relu", "tanh", "gelu"))
    norm = choice(generator, (False, True))
    return classifier(
        f"cnn-{activation}{'-bn' if norm else ''}-{'-'.join(map(str, channels))}",
        data.Noisy(source, log_uniform(generator, 0.1, 0.5)),
        channels,
        activation,
        norm=norm,
        pool=choice(generator, ("max", "avg")),
        head=choice(generator, ("flatten", "average")),
        batch_size=choice(generator, (16, 32, 64)),
        steps=horizon(generator),
        scale=log_uniform(generator, 0.5, 2.0),
    )
