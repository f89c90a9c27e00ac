"""Signals in time: sounds of synthetic instruments, and a chaotic system to be forecast."""

import functools
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks.data import Batch
from tasks.held_out.layers import dense
from tasks.task import Problem, cross_entropy

# ------------------------------------------------------------------------------------------ sounds

SAMPLES = 512
INSTRUMENTS = 9


def sounds(generator: Generator, count: int) -> Batch:
    """Sounds [count, 1, SAMPLES] of random pitch, onset, loudness and phase, in noise, and their instrument [count].

    Sine, square, sawtooth, plucked (partials that fade, the higher the faster), frequency modulation, amplitude
    modulation, a glide upward, one downward, and a bell (partials that are no multiples).
    """
    y = torch.randint(INSTRUMENTS, (count,), generator=generator)
    pitch, onset, phase, depth, loud = torch.rand(5, count, 1, generator=generator)
    time = torch.linspace(0, 1, SAMPLES) - 0.3 * onset
    base = 2 * math.pi * 12 * 2 ** (1.5 * pitch)  # 12 to 34 periods
    angle = base * time + 2 * math.pi * phase
    past = time.clamp(min=0)
    number = torch.arange(1, 7.0)[:, None, None]
    harmonics = torch.sin(number * angle) / number  # [6, count, SAMPLES]
    bell = torch.tensor([1.0, 2.76, 5.4])[:, None, None]
    slow = 2 * math.pi * (4 + 4 * depth)
    kinds = [
        torch.sin(angle),
        harmonics[::2].sum(0) * 1.2,
        harmonics.sum(0) * 0.8,
        (harmonics * torch.exp(-2 * number * past)).sum(0),
        torch.sin(angle + (2 + 2 * depth) * torch.sin(slow * time)),
        torch.sin(angle) * (1 + torch.sin(slow * time)) * 0.8,
        torch.sin(angle * (1 + 0.4 * past)),
        torch.sin(angle * (1 - 0.4 * past)),
        (torch.sin(bell * angle) * torch.exp(-bell * past)).sum(0) * 0.7,
    ]
    x = torch.stack(kinds, 1)[torch.arange(count), y] * (time > 0) * (0.5 + loud)
    return (x + 0.7 * torch.randn(x.shape, generator=generator)).unsqueeze(1), y


class GatedConvolution(nn.Module):
    """van den Oord et al. 2016, "WaveNet", equation 2: tanh times sigmoid of a convolution with gaps.

    x [B, width, T] -> the gated channels [B, width, T].
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, -2)
        return torch.tanh(a) * torch.sigmoid(b)


class WaveNet(nn.Module):
    """Sounds [B, 1, T] -> classes: a mixture of each layer's channels is added to what goes on, another is heard; the
    mean over time of all that is heard goes into a small network."""

    def __init__(self, width: int, heard: int, depth: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 8, 4)
        self.layers = nn.ModuleList(GatedConvolution(width, 2**i) for i in range(depth))
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth - 1))
        self.skip = nn.ModuleList(nn.Conv1d(width, heard, 1) for _ in range(depth))
        self.head = dense([heard, heard, classes], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        gated = self.layers[0](h)
        heard = self.skip[0](gated)
        for mix, layer, skip in zip(self.mix, self.layers[1:], self.skip[1:], strict=True):
            h = h + mix(gated)
            gated = layer(h)
            heard = heard + skip(gated)
        return self.head(functional.relu(heard).mean(-1))


def wavenet_sounds() -> Problem:
    """Which instrument it is, from the waveform."""
    return Problem(
        "stream-wavenet-sounds",
        lambda: WaveNet(28, 44, 6, INSTRUMENTS),
        sounds,
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=32,
        steps=1000,
        ceiling=math.log(INSTRUMENTS),
        eval_size=256,
    )


# ----------------------------------------------------------------------------------------- weather

VARIABLES, FORCING, DT = 8, 8.0, 0.05
LOOK_BACK, AHEAD = 54, 18


def lorenz_rate(x: Tensor) -> Tensor:
    """dx_i/dt = (x_(i+1) - x_(i-2)) x_(i-1) - x_i + FORCING around a circle [..., VARIABLES] (Lorenz 1996)."""
    ahead, back, two_back = x.roll(-1, -1), x.roll(1, -1), x.roll(2, -1)
    return (ahead - two_back) * back - x + FORCING


@functools.cache
def weather(steps: int) -> Tensor:
    """Noisy observations [VARIABLES, steps] of the Lorenz system by Runge-Kutta steps of DT, standardised."""
    g = Generator().manual_seed(0)
    x, states = FORCING + torch.randn(VARIABLES, generator=g, dtype=torch.float64), []
    for _ in range(steps + 200):
        k1 = lorenz_rate(x)
        k2 = lorenz_rate(x + DT / 2 * k1)
        k3 = lorenz_rate(x + DT / 2 * k2)
        x = x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + lorenz_rate(x + DT * k3))
        states.append(x)
    series = torch.stack(states[200:], 1).float()
    series = (series - series.mean()) / series.std()
    return series + 0.05 * torch.randn(series.shape, generator=g)


class DoublyResidual(nn.Module):
    """Oreshkin et al. 2020, "N-BEATS", generic blocks: each explains part of the past and adds to the forecast.

    [B, LOOK_BACK] -> [B, AHEAD]
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        sizes = [LOOK_BACK, width, width, width, LOOK_BACK + AHEAD]
        self.blocks = nn.ModuleList(dense(sizes, nn.ReLU) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        forecasts = []
        for block in self.blocks:
            past, forecast = block(x).split([LOOK_BACK, AHEAD], -1)
            x = x - past
            forecasts.append(forecast)
        return torch.stack(forecasts).sum(0)


def nbeats_weather() -> Problem:
    """The next values of one variable from its past alone, by absolute errors; the last fifth of time is held out."""
    length, total = LOOK_BACK + AHEAD, 6000
    series = weather(total)
    train = total * 4 // 5
    cut = series.unfold(1, length, 1)

    def sample(generator: Generator, count: int) -> Batch:
        which = torch.randint(VARIABLES, (count,), generator=generator)
        start = torch.randint(train - length + 1, (count,), generator=generator)
        x = cut[which, start]
        return x[:, :LOOK_BACK], x[:, LOOK_BACK:]

    def held_out() -> Batch:
        x = cut[:, train :: LOOK_BACK // 4].flatten(0, 1)[:1024]
        return x[:, :LOOK_BACK], x[:, LOOK_BACK:]

    return Problem(
        "nbeats-weather",
        lambda: DoublyResidual(172, 4),
        sample,
        lambda model, x, y: (model(x) - y).abs().mean(),
        batch_size=64,
        steps=1500,
        held_out=held_out,
    )
