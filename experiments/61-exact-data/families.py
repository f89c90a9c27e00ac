"""Families of tasks whose data have no noise: functions, algorithms and physics that a network can fit ever better."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.func import jvp
from torch.nn import functional

from tasks.fields import siren
from tasks.mlp import ACTIVATIONS, Gated, mlp
from tasks.recurrent import Recurrent
from tasks.task import Problem, Task, choice, cross_entropy, horizon, log_uniform, mean_squared_error
from tasks.transformer import Block

SMOOTH = ("tanh", "sin", "gelu", "silu", "softplus")
Source = Callable[[Generator, int], tuple[Tensor, ...]]


def _fit(name: str, build: Callable[[], nn.Module], sample: Source, generator: Generator, **settings) -> Problem:
    """Fit values by their mean squared error, or classes (integers) by cross-entropy."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mean_squared_error(model(x), y) if y.is_floating_point() else cross_entropy(model(x), y)

    settings = {"batch_size": choice(generator, (32, 64, 128)), "steps": horizon(generator, 150, 1500)} | settings
    return Problem(f"exact-{name}", build, sample, loss, **settings)


def _hidden(generator: Generator, widths: tuple[int, ...] = (24, 32, 48, 64, 96)) -> list[int]:
    return [choice(generator, widths) for _ in range(choice(generator, (2, 2, 3)))]


# ------------------------------------------------------------------------------------- functions


def sample_function(generator: Generator) -> Task:
    """A smooth function of two to six numbers, by MLPs: waves, bumps or a polynomial with random coefficients."""
    inputs, kind = choice(generator, (2, 3, 4, 6)), choice(generator, ("waves", "bumps", "polynomial"))
    terms = torch.randn(5, inputs, generator=generator)
    weight, sharp = torch.randn(5, generator=generator), log_uniform(generator, 0.7, 3.0)

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        x = 2 * torch.rand(count, inputs, generator=g) - 1
        if kind == "waves":
            y = torch.sin(sharp * x @ terms.T + weight) @ weight
        elif kind == "bumps":
            y = torch.exp(-sharp * (x[:, None] - terms / 2).square().sum(-1)) @ weight
        else:
            y = (x @ terms.T).pow(torch.arange(1, 6)) @ (weight / torch.tensor([1.0, 2, 6, 24, 120]))
        return x, 3 * y[:, None] / weight.norm()

    hidden, activation = _hidden(generator), choice(generator, ("relu", *SMOOTH))
    name = f"function-{kind}-{activation}-{'-'.join(map(str, hidden))}"
    return _fit(name, lambda: mlp([inputs, *hidden, 1], activation), sample, generator)


def sample_picture(generator: Generator) -> Task:
    """The colours of a picture of waves and discs by their place, by networks of sines."""
    waves, phase = 6 * torch.randn(4, 2, generator=generator), 6 * torch.rand(4, generator=generator)
    mix, centre = torch.randn(4, 3, generator=generator) / 2, torch.rand(2, generator=generator) - 0.5

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        x = 2 * torch.rand(count, 2, generator=g) - 1
        disc = torch.tanh(20 * ((x - centre).norm(dim=-1, keepdim=True) - 0.4))
        return x, torch.sin(x @ waves.T + phase) @ mix / 2 + disc / 2

    width, depth, omega = choice(generator, (16, 24, 32, 48)), choice(generator, (2, 3)), choice(generator, (8, 15, 30))
    build = lambda: siren(2, 3, width=width, depth=depth, omega=omega)  # noqa: E731
    return _fit(f"picture-{width}-{depth}-{omega}", build, sample, generator, batch_size=choice(generator, (128, 512)))


def sample_algebra(generator: Generator) -> Task:
    """Determinants, inverses or largest eigenvalues of matrices near the identity, by plain and gated MLPs."""
    n, kind = choice(generator, (2, 3)), choice(generator, ("det", "inverse", "norm"))

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        a = 0.3 * torch.randn(count, n, n, generator=g)
        whole = a + 1.5 * torch.eye(n)
        if kind == "det":
            return a.flatten(1), torch.linalg.det(whole)[:, None] / 2
        if kind == "inverse":
            gram = whole @ whole.mT + torch.eye(n)
            return a.flatten(1), 3 * torch.linalg.inv(gram).flatten(1)
        return a.flatten(1), torch.linalg.matrix_norm(a, 2)[:, None]

    width, out, activation = choice(generator, (24, 32, 48, 64)), n * n if kind == "inverse" else 1, "silu"
    gated = choice(generator, (False, True))

    def build() -> nn.Module:
        if gated:
            return nn.Sequential(
                Gated(n * n, width, activation), Gated(width, width, activation), nn.Linear(width, out)
            )
        return mlp([n * n, width, width, out], "relu")

    return _fit(f"algebra-{kind}{n}-{width}{'-gated' if gated else ''}", build, sample, generator)


# -------------------------------------------------------------------------------------- physics


class Residual(nn.Module):
    """x + f(x): the next state of a system."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def sample_dynamics(generator: Generator) -> Task:
    """The state of an oscillator or of three species a moment later, by MLPs."""
    kind, strength = choice(generator, ("duffing", "vanderpol", "species")), log_uniform(generator, 0.5, 2.0)
    size = 3 if kind == "species" else 2

    def rate(s: Tensor) -> Tensor:
        if kind == "species":
            a, b, c = s.unbind(-1)
            return torch.stack([a * (1 - a - strength * b), b * (1 - b - strength * c), c * (1 - c - strength * a)], -1)
        x, v = s.unbind(-1)
        force = x - strength * x**3 - 0.2 * v if kind == "duffing" else strength * (1 - x * x) * v - x
        return torch.stack([v, force], -1)

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        start = torch.rand(count, size, generator=g) * (1.5 if kind == "species" else 3)
        start = start if kind == "species" else start - 1.5
        state = start
        for _ in range(20):  # midpoint rule
            state = state + 0.03 * rate(state + 0.015 * rate(state))
        return start, state

    hidden, activation = _hidden(generator), choice(generator, ("relu", "tanh", "silu"))
    name = f"dynamics-{kind}-{activation}-{'-'.join(map(str, hidden))}"
    return _fit(name, lambda: Residual(mlp([size, *hidden, size], activation)), sample, generator)


def sample_equation(generator: Generator) -> Task:
    """An ordinary differential equation y' + a y = f on [0, 3], y(0) = 0, by its residual at random points."""
    a, waves = log_uniform(generator, 0.3, 3.0), 1 + 4 * torch.rand(3, generator=generator)
    hidden, activation = _hidden(generator, (24, 32, 48)), choice(generator, ("tanh", "sin", "gelu"))

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        return (3 * torch.rand(count, 1, generator=g),)

    def loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        value, slope = jvp(lambda at: at * model(at), (x,), (torch.ones_like(x),))
        return mean_squared_error(slope + a * value, torch.sin(x * waves).sum(-1, keepdim=True))

    return Problem(
        f"exact-equation-{activation}-{'-'.join(map(str, hidden))}",
        lambda: mlp([1, *hidden, 1], activation),
        sample,
        loss,
        batch_size=choice(generator, (32, 64, 128)),
        steps=horizon(generator, 150, 1500),
    )


class Periodic(nn.Module):
    """Convolutions on a ring or a torus, each position's output by a linear map."""

    def __init__(self, channels: int, width: int, depth: int, out: int, dims: int, activation: str) -> None:
        super().__init__()
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        sizes = [channels] + depth * [width]
        self.layers = nn.ModuleList(
            conv(a, b, 3, padding=1, padding_mode="circular") for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.act, self.head = ACTIVATIONS[activation](), conv(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return self.head(x).movedim(1, -1)


def sample_heat(generator: Generator) -> Task:
    """Temperatures, or a wave with friction, on a ring some time later, by convolutions."""
    points, time, steep = choice(generator, (16, 24)), log_uniform(generator, 0.5, 4.0), choice(generator, (0.0, 1.0))
    frequency = torch.arange(points // 2 + 1)
    decay = torch.exp(-time * (2 * math.pi * frequency / points).square())

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        start = torch.fft.irfft(torch.fft.rfft(2 * torch.randn(count, points, generator=g)) * decay.sqrt(), points)
        end = torch.fft.irfft(torch.fft.rfft(start + steep * start.pow(2)) * decay, points)
        return start[:, None], end[..., None]

    width, depth, activation = choice(generator, (8, 12, 16)), choice(generator, (2, 3)), choice(generator, SMOOTH)
    build = lambda: Periodic(1, width, depth, 1, 1, activation)  # noqa: E731
    batch_size = choice(generator, (16, 32))
    return _fit(f"heat-{points}-{width}-{depth}-{activation}", build, sample, generator, batch_size=batch_size)


def sample_control(generator: Generator) -> Task:
    """To imitate a controller whose force is limited, and which weighs random parts of the state, by MLPs."""
    size, limit = choice(generator, (4, 6, 8)), log_uniform(generator, 0.3, 2.0)
    gain = torch.randn(2, size, generator=generator)

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        x = torch.randn(count, size, generator=g)
        force = x @ gain.T
        return x, (force + 0.3 * force.flip(-1) * x[:, :1].sign()).clamp(-limit, limit)

    hidden, activation = _hidden(generator), choice(generator, ("relu", "tanh", "elu"))
    name = f"control-{activation}-{'-'.join(map(str, hidden))}"
    return _fit(name, lambda: mlp([size, *hidden, 2], activation), sample, generator)


# ------------------------------------------------------------------------------------- algorithms


def sample_automaton(generator: Generator) -> Task:
    """The next state of a random automaton on a torus, whose cells count their neighbours, by convolutions."""
    side, rule = choice(generator, (6, 8, 10)), (torch.rand(2, 9, generator=generator) < 0.5).long()
    kernel = torch.ones(1, 1, 3, 3)
    kernel[..., 1, 1] = 0

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        cells = (torch.rand(count, 1, side, side, generator=g) < 0.4).float()
        around = functional.conv2d(functional.pad(cells, (1, 1, 1, 1), mode="circular"), kernel)
        return 2 * cells - 1, rule[cells.long(), around.long()][:, 0]

    width, depth = choice(generator, (8, 12, 16)), choice(generator, (2, 3))
    activation = choice(generator, ("relu", "gelu"))
    build = lambda: Periodic(1, width, depth, 2, 2, activation)  # noqa: E731
    batch_size = choice(generator, (8, 16))
    return _fit(f"automaton-{side}-{width}-{depth}-{activation}", build, sample, generator, batch_size=batch_size)


class Ranker(nn.Module):
    """Transformer blocks on a set of numbers, each of which gets a place."""

    def __init__(self, places: int, width: int, heads: int, depth: int, activation: str) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        each = [Block(width, heads, 2 * width, activation, causal=False, fused=False) for _ in range(depth)]
        self.blocks = nn.Sequential(*each)
        self.head = nn.Linear(width, places)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x[..., None])))


def sample_ranks(generator: Generator) -> Task:
    """The rank of every number of a set, by transformers."""
    count, width, depth = choice(generator, (5, 6, 8)), choice(generator, (16, 24, 32)), choice(generator, (1, 2))
    heads, activation = choice(generator, (2, 4)), choice(generator, ("relu", "gelu"))

    def sample(g: Generator, n: int) -> tuple[Tensor, ...]:
        x = torch.randn(n, count, generator=g)
        return x, x.argsort(-1).argsort(-1)

    build = lambda: Ranker(count, width, heads, depth, activation)  # noqa: E731
    batch_size = choice(generator, (16, 32))
    return _fit(f"ranks-{count}-{width}-{depth}-{activation}", build, sample, generator, batch_size=batch_size)


def sample_memory(generator: Generator) -> Task:
    """Running sums, maxima or the last marked number of a sequence, at every place, by recurrent networks."""
    length, kind = choice(generator, (6, 8, 12)), choice(generator, ("sum", "maximum", "marked"))
    cell, width = choice(generator, ("tanh", "gru", "lstm")), choice(generator, (16, 24, 32))

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        value = torch.randn(count, length, generator=g)
        mark = (torch.rand(count, length, generator=g) < 0.4).float()
        mark[:, 0] = 1
        if kind == "sum":
            y = (mark * value).cumsum(-1) / math.sqrt(length)
        elif kind == "maximum":
            y = value.cummax(-1).values
        else:
            y = value.gather(1, (mark * torch.arange(length)).cummax(-1).values.long())
        return torch.stack([value, mark], -1), y[..., None]

    build = lambda: Recurrent(nn.Identity(), 2, 1, kind=cell, width=width, depth=1, last=False)  # noqa: E731
    return _fit(f"memory-{kind}-{cell}-{width}-{length}", build, sample, generator)


def sample_formula(generator: Generator) -> Task:
    """Whether random clauses of three signs hold, by MLPs: the number of clauses that do."""
    inputs, clauses = choice(generator, (8, 12, 16)), choice(generator, (2, 3, 4))
    which = torch.stack([torch.randperm(inputs, generator=generator)[:3] for _ in range(clauses)])
    sign = torch.randint(2, (clauses, 3), generator=generator) * 2 - 1

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        x = torch.randint(2, (count, inputs), generator=g) * 2.0 - 1
        return x, (x[:, which] * sign > 0).any(-1).sum(-1)

    hidden, activation = _hidden(generator), choice(generator, ("relu", "gelu", "tanh"))
    name = f"formula-{activation}-{'-'.join(map(str, hidden))}"
    return _fit(name, lambda: mlp([inputs, *hidden, clauses + 1], activation), sample, generator)


class Pairs(nn.Module):
    """A table of vectors for each of two ids, and an MLP of both."""

    def __init__(self, count: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(count, width), nn.Embedding(count, width)
        self.read = mlp([width, hidden, out], "relu")

    def forward(self, ids: Tensor) -> Tensor:
        left, right = ids.unbind(-1)
        return self.read(self.left(left) + self.right(right))


def sample_table(generator: Generator) -> Task:
    """Sums or products modulo a prime, by embeddings and an MLP."""
    prime, kind = choice(generator, (7, 11, 13, 17)), choice(generator, ("sum", "product"))
    width, hidden = choice(generator, (16, 24, 32)), choice(generator, (32, 48, 64))

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        ids = torch.randint(prime, (count, 2), generator=g)
        return ids, (ids.sum(-1) if kind == "sum" else ids.prod(-1)) % prime

    return _fit(f"table-{kind}-{prime}-{width}", lambda: Pairs(prime, width, hidden, prime), sample, generator)


def sample_curves(generator: Generator) -> Task:
    """Curves of a few parameters through a narrow layer, by autoencoders."""
    points, code = choice(generator, (24, 32)), choice(generator, (3, 4, 6))
    at = torch.linspace(0, 1, points)

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        a, f, p = torch.rand(3, count, 1, generator=g)
        x = (0.5 + a) * torch.sin((3 + 5 * f) * at + 6 * p)
        return x, x

    width, activation = choice(generator, (32, 48, 64)), choice(generator, ("relu", *SMOOTH))
    name = f"curves-{points}-{width}-{code}-{activation}"
    return _fit(name, lambda: mlp([points, width, code, width, points], activation), sample, generator)


class DeepSets(nn.Module):
    """A function of the mean of functions (Zaheer et al. 2017)."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.each = nn.Sequential(mlp([2, width, width], activation), ACTIVATIONS[activation]())
        self.all = mlp([width, width, 2], activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(self.each(x).mean(-2))


def sample_sets(generator: Generator) -> Task:
    """A statistic of a set of pairs of numbers, by Deep Sets."""
    kind, size = choice(generator, ("deviation", "extreme", "slope")), choice(generator, (8, 16))
    width, activation = choice(generator, (24, 32, 48)), choice(generator, ("relu", "gelu", "tanh"))

    def sample(g: Generator, count: int) -> tuple[Tensor, ...]:
        x = (0.3 + torch.rand(count, 1, 2, generator=g)) * torch.randn(count, size, 2, generator=g)
        if kind == "deviation":
            return x, x.std(1, correction=0)
        if kind == "extreme":
            return x, x.abs().amax(1)
        return x, (x * x.flip(-1)).mean(1) / (0.1 + x.square().mean(1))

    return _fit(f"sets-{kind}-{width}-{size}-{activation}", lambda: DeepSets(width, activation), sample, generator)


FAMILIES = {
    "function": sample_function,
    "picture": sample_picture,
    "algebra": sample_algebra,
    "dynamics": sample_dynamics,
    "equation": sample_equation,
    "heat": sample_heat,
    "control": sample_control,
    "automaton": sample_automaton,
    "ranks": sample_ranks,
    "memory": sample_memory,
    "formula": sample_formula,
    "table": sample_table,
    "curves": sample_curves,
    "sets": sample_sets,
}
