"""Residual networks: of fully connected blocks with LayerNorm, and of convolutions with or without BatchNorm."""

from collections.abc import Sequence

from torch import Generator, Tensor, nn

from tasks import data
from tasks.mlp import ACTIVATIONS
from tasks.task import Supervised, Task, choice, horizon, log_uniform


class DenseBlock(nn.Module):
    """x + down(act(up(norm(x))))."""

    def __init__(self, width: int, hidden: int, activation: str, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def residual_mlp(
    fan_in: int, classes: int, *, width: int, hidden: int, depth: int, activation: str, norm: bool = True
) -> nn.Sequential:
    """A linear layer into a stream [..., width], `depth` blocks on it, a (normalised) linear head."""
    blocks = [DenseBlock(width, hidden, activation, norm) for _ in range(depth)]
    last = nn.LayerNorm(width) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(fan_in, width), *blocks, last, nn.Linear(width, classes))


class ConvBlock(nn.Module):
    """act(skip(x) + norm(conv(act(norm(conv(x)))))), He et al. 2016, "Deep Residual Learning", figure 2.

    The first convolution may halve the sides; then, or where the channels change, the skip is a 1x1 convolution.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int, activation: str, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=not norm)
        self.norm1 = _batch_norm(fan_out, norm)
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=not norm)
        self.norm2 = _batch_norm(fan_out, norm)
        same = stride == 1 and fan_in == fan_out
        self.skip = nn.Identity() if same else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
        self.act2 = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.skip(x) + self.norm2(self.conv2(h)))


def _batch_norm(channels: int, norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False) if norm else nn.Identity()


def resnet(
    fan_in: int, classes: int, *, channels: Sequence[int], blocks: int, activation: str = "relu", norm: bool = True
) -> nn.Sequential:
    """A convolution, `blocks` blocks per entry of `channels` (each entry but the first halves the sides), mean, head.

    BatchNorm normalises by the batch's own statistics, always.
    """
    layers: list[nn.Module] = [nn.Conv2d(fan_in, channels[0], 3, padding=1, bias=not norm)]
    layers += [_batch_norm(channels[0], norm), ACTIVATIONS[activation]()]
    width = channels[0]
    for stage, fan_out in enumerate(channels):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(ConvBlock(width, fan_out, stride, activation, norm))
            width = fan_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def mlp_classifier(
    name: str,
    source: data.Data,
    *,
    width: int,
    hidden: int,
    depth: int,
    activation: str,
    norm: bool = True,
    **settings,
) -> Supervised:
    """A `residual_mlp` that classifies `source`; settings of `Supervised`."""
    source = data.Flat(source)
    fan_in, classes = source.shape[0], source.classes
    shape = {"width": width, "hidden": hidden, "depth": depth}
    return Supervised(
        name, lambda: residual_mlp(fan_in, classes, **shape, activation=activation, norm=norm), source, **settings
    )


def image_classifier(
    name: str,
    source: data.Data,
    *,
    channels: Sequence[int],
    blocks: int,
    activation: str = "relu",
    norm: bool = True,
    **settings,
) -> Supervised:
    """A `resnet` that classifies the images of `source`; settings of `Supervised`."""

    def build() -> nn.Module:
        fan_in = source.shape[0]
        return resnet(fan_in, source.classes, channels=channels, blocks=blocks, activation=activation, norm=norm)

    return Supervised(name, build, source, **settings)


def sample_mlp(generator: Generator) -> Task:
    """1 to 3 blocks of width 16 to 48 on digits or photograph patches of 64 to 768 numbers."""
    width = choice(generator, (16, 24, 32, 48))
    shape = {"width": width, "hidden": width * choice(generator, (1, 2)), "depth": choice(generator, (1, 2, 3))}
    activation, norm = choice(generator, tuple(ACTIVATIONS)), choice(generator, (True, True, False))
    size = choice(generator, (0, 8, 12, 16))
    source = data.photos(size, (2, 3)) if size else data.digits()
    return mlp_classifier(
        f"residual-mlp-{activation}-{'-'.join(map(str, shape.values()))}{'-ln' if norm else ''}-{size}",
        data.Noisy(source, log_uniform(generator, 0.1, 0.5)),
        **shape,
        activation=activation,
        norm=norm,
        batch_size=choice(generator, (32, 64, 128)),
        **_settings(generator),
    )


def sample_resnet(generator: Generator) -> Task:
    """1 or 2 stages of a block each, 4 to 16 channels, on digits or photograph patches."""
    source = choice(generator, [data.digits(), data.photos(8, (2, 3))])
    channels = [choice(generator, (4, 8, 12, 16)) for _ in range(choice(generator, (1, 2)))]
    activation, norm = choice(generator, ("relu", "relu", "tanh", "gelu")), choice(generator, (True, True, False))
    return image_classifier(
        f"resnet-{activation}{'-bn' if norm else ''}-{'-'.join(map(str, channels))}",
        data.Noisy(source, log_uniform(generator, 0.1, 0.5)),
        channels=channels,
        blocks=1,
        activation=activation,
        norm=norm,
        batch_size=choice(generator, (16, 32, 64)),
        **_settings(generator),
    )


def _settings(generator: Generator) -> dict:
    return {"steps": horizon(generator), "scale": log_uniform(generator, 0.5, 2.0)}
