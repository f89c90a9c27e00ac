"""Data that never repeat: every example is drawn afresh from a distribution, and no finite set is behind it.

A `Stream` is a `tasks.data.Data` whose held-out batch is one more draw, of a fixed seed. There are random networks
(`TeacherClasses`, `TeacherValues`), drawn images (`Shapes`, `Gratings`), token sequences (`Chain`, `Repeats`,
`Arithmetic`) and signals (`Waves`). What defines the distribution (a teacher's weights, the table of a chain) is a
function of the field `seed`.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from tasks.data import HELD_OUT, Batch, Data

HELD_OUT_SEED = 10**9 + 7  # of the held-out draw; runs and samples of the train loss use small seeds
MOMENT_EXAMPLES = 2048  # a teacher's outputs and an image's pixels are standardised over so many examples


class Stream(ABC):
    """Examples of a distribution: those of `held_out` are distributed as those of `sample`, noise included."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def classes(self) -> int: ...

    @abstractmethod
    def sample(self, generator: Generator, count: int) -> Batch: ...

    def held_out(self) -> Batch:
        return self.sample(Generator().manual_seed(HELD_OUT_SEED), self._held_out_count)

    @property
    def _held_out_count(self) -> int:
        return HELD_OUT


@dataclass(frozen=True, eq=False)
class Mislabelled(Stream):
    """Examples of `data`, whose labels y [count] are replaced, with probability `share`, by uniform ones."""

    data: Data
    share: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def classes(self) -> int:
        return self.data.classes

    def sample(self, generator: Generator, count: int) -> Batch:
        x, y = self.data.sample(generator, count)
        other = torch.randint(self.classes, y.shape, generator=generator)
        return x, torch.where(torch.rand(y.shape, generator=generator) < self.share, other, y)


# ---------------------------------------------------------------------------------- random networks

TEACHER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "sin": torch.sin}


@dataclass(frozen=True, eq=False)
class Teacher(Stream):
    """Gaussian inputs [inputs] and the outputs of a random network without biases.

    Args:
        inputs: the size of an input. Its covariance has the eigenvalues k^(-2 decay), k = 1, 2, ..., scaled to a mean
            of one, and random eigenvectors.
        hidden: widths of the teacher's hidden layers; none: it is linear.
        outputs: how many outputs it has. They are standardised: mean 0 and variance 1 over inputs, each.
        activation: of `TEACHER_ACTIVATIONS`.
        decay: 0 for inputs of independent entries.
        noise: see the subclasses.
        seed: of the teacher's weights and the eigenvectors.
    """

    inputs: int
    hidden: tuple[int, ...]
    outputs: int
    activation: str = "relu"
    decay: float = 0.0
    noise: float = 0.0
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.inputs,)

    @functools.cached_property
    def _root(self) -> Tensor | None:
        """The matrix [inputs, inputs] that colours white inputs; None leaves them as they are."""
        if self.decay == 0:
            return None
        spectrum = torch.arange(1.0, self.inputs + 1) ** -self.decay
        spectrum /= spectrum.square().mean().sqrt()
        turn, _ = torch.linalg.qr(torch.randn(self.inputs, self.inputs, generator=Generator().manual_seed(self.seed)))
        return spectrum.unsqueeze(1) * turn

    @functools.cached_property
    def _teacher(self) -> tuple[list[Tensor], Tensor]:
        """The hidden matrices [fan_in, width], and the last, whose first row is the bias: outputs are standardised."""
        generator = Generator().manual_seed(self.seed + 1)
        sizes = [self.inputs, *self.hidden, self.outputs]
        gains = [1.0, *len(self.hidden) * [math.sqrt(2.0) if self.activation == "relu" else 1.0]]
        *hidden, last = (
            torch.randn(a, b, generator=generator) * gain / math.sqrt(a)
            for a, b, gain in zip(sizes[:-1], sizes[1:], gains, strict=True)
        )
        outputs = self._hidden(self._draw(generator, MOMENT_EXAMPLES), hidden) @ last
        mean, std = outputs.mean(0, keepdim=True), outputs.std(0, keepdim=True)
        return hidden, torch.cat([-mean, last]) / std

    def _hidden(self, x: Tensor, matrices: list[Tensor]) -> Tensor:
        act = TEACHER_ACTIVATIONS[self.activation]
        for matrix in matrices:
            x = act(x @ matrix)
        return x

    def _draw(self, generator: Generator, count: int) -> Tensor:
        x = torch.randn(count, self.inputs, generator=generator)
        return x if self._root is None else x @ self._root

    def answers(self, x: Tensor) -> Tensor:
        """The teacher's outputs [count, outputs], before noise."""
        hidden, last = self._teacher
        return torch.addmm(last[0], self._hidden(x, hidden), last[1:])


@dataclass(frozen=True, eq=False)
class TeacherClasses(Teacher):
    """y: the largest output; with noise > 0 it is drawn from softmax(outputs / noise)."""

    @property
    def classes(self) -> int:
        return self.outputs

    def sample(self, generator: Generator, count: int) -> Batch:
        x = self._draw(generator, count)
        scores = self.answers(x)
        if self.noise > 0:  # the largest of logits + Gumbel noise is a sample of their softmax
            gumbel = torch.empty_like(scores).exponential_(generator=generator).log_()
            scores = scores.sub_(gumbel, alpha=self.noise)
        return x, scores.argmax(1)


@dataclass(frozen=True, eq=False)
class TeacherValues(Teacher):
    """y [outputs]: the outputs plus Gaussian noise of standard deviation `noise`, to be regressed on."""

    @property
    def classes(self) -> int:
        raise TypeError("values have no classes. Pass loss=mean_squared_error to the task.")

    def sample(self, generator: Generator, count: int) -> Batch:
        x = self._draw(generator, count)
        y = self.answers(x)
        return x, y + self.noise * torch.randn(y.shape, generator=generator) if self.noise > 0 else y


# ---------------------------------------------------------------------------------------- images


@dataclass(frozen=True, eq=False)
class Drawn(Stream):
    """Images [1, size, size] of a random kind, at a random place, scale and contrast; y is the kind.

    Pixels are standardised before Gaussian noise of standard deviation `noise` is added to them.
    """

    size: int
    noise: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.size, self.size)

    @functools.cached_property
    def _grid(self) -> Tensor:
        """Coordinates of the pixels, from -1 to 1: [2, size^2], horizontal and vertical."""
        line = torch.linspace(-1, 1, self.size)
        vertical, horizontal = torch.meshgrid(line, line, indexing="ij")
        return torch.stack([horizontal.flatten(), vertical.flatten()])

    @functools.cached_property
    def _moments(self) -> tuple[float, float]:
        generator = Generator().manual_seed(0)
        x = self._image(generator, torch.randint(self.classes, (MOMENT_EXAMPLES,), generator=generator))
        return float(x.mean()), float(x.std())

    def sample(self, generator: Generator, count: int) -> Batch:
        y = torch.randint(self.classes, (count,), generator=generator)
        mean, std = self._moments
        x = self._image(generator, y).sub_(mean).div_(std)
        if self.noise > 0:
            x = x.add_(torch.randn(x.shape, generator=generator), alpha=self.noise)
        return x.view(count, *self.shape), y

    @abstractmethod
    def _image(self, generator: Generator, y: Tensor) -> Tensor:
        """Pixels [count, size^2] of images of the kinds y [count]."""


LOBES = (0, 2, 3, 4, 5)
SHARPNESS = 8.0  # of an edge, per half side of the image


@dataclass(frozen=True, eq=False)
class Shapes(Drawn):
    """Ten kinds: a disk and flowers of 2, 3, 4 or 5 lobes at any angle, filled (y < 5) or in outline."""

    @property
    def classes(self) -> int:
        return 2 * len(LOBES)

    def _image(self, generator: Generator, y: Tensor) -> Tensor:
        across, down, scale, angle, contrast = torch.rand(5, len(y), 1, generator=generator)
        lobes = torch.tensor(LOBES, dtype=torch.float32)[y % len(LOBES)].unsqueeze(1)
        depth = 0.4 * (lobes > 0)
        dx, dy = self._grid[0] - (0.8 * across - 0.4), self._grid[1] - (0.8 * down - 0.4)
        edge = (0.35 + 0.3 * scale) * (1 + depth * torch.cos(lobes * torch.atan2(dy, dx) + 2 * math.pi * angle))
        inside = torch.sigmoid(SHARPNESS * (edge - torch.hypot(dx, dy)))
        outline = 4 * inside * (1 - inside)
        return (0.5 + contrast) * torch.where(y.unsqueeze(1) < len(LOBES), inside, outline)


ORIENTATIONS = 4
WAVE_NUMBERS = (3.5, 6.0)  # radians per half side of the image


@dataclass(frozen=True, eq=False)
class Gratings(Drawn):
    """Eight kinds: sine gratings of four orientations and two wave numbers, any phase, under a Gaussian window."""

    @property
    def classes(self) -> int:
        return ORIENTATIONS * len(WAVE_NUMBERS)

    def _image(self, generator: Generator, y: Tensor) -> Tensor:
        across, down, scale, turn, phase, contrast = torch.rand(6, len(y), 1, generator=generator)
        angle = (y.unsqueeze(1) % ORIENTATIONS + 0.5 * turn) * (math.pi / ORIENTATIONS)
        number = torch.tensor(WAVE_NUMBERS)[y // ORIENTATIONS].unsqueeze(1)
        dx, dy = self._grid[0] - (0.8 * across - 0.4), self._grid[1] - (0.8 * down - 0.4)
        window = torch.exp((dx.square() + dy.square()) / (-2 * (0.3 + 0.4 * scale).square()))
        wave = torch.cos(number * (dx * torch.cos(angle) + dy * torch.sin(angle)) + 2 * math.pi * phase)
        return (0.5 + contrast) * window * wave


# -------------------------------------------------------------------------------------- sequences


@dataclass(frozen=True, eq=False)
class Sequences(Stream):
    """Token sequences x [length], int64; y is the same moved by one, as of `tasks.data.Windows`."""

    length: int
    vocabulary: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def classes(self) -> int:
        return self.vocabulary

    @property
    def _held_out_count(self) -> int:
        return HELD_OUT // 4

    def sample(self, generator: Generator, count: int) -> Batch:
        tokens = self._tokens(generator, count)
        return tokens[:, :-1], tokens[:, 1:]

    @abstractmethod
    def _tokens(self, generator: Generator, count: int) -> Tensor:
        """[count, length + 1]"""


@dataclass(frozen=True, eq=False)
class Chain(Sequences):
    """A random Markov chain of order two.

    Each pair of tokens has `branches` random successors, the k-th (k = 0, 1, ...) of probability proportional to 2^-k.
    With probability `restart` the next token is uniform instead, as the first two are.
    """

    branches: int = 4
    restart: float = 0.02
    seed: int = 0

    @functools.cached_property
    def _successors(self) -> Tensor:
        """[vocabulary^2 * branches], flat."""
        generator = Generator().manual_seed(self.seed)
        return torch.randint(self.vocabulary, (self.vocabulary**2 * self.branches,), generator=generator)

    def _tokens(self, generator: Generator, count: int) -> Tensor:
        # Which successor: the number of halvings of a uniform variable, truncated to fewer than `branches`.
        uniform = torch.rand(self.length + 1, count, generator=generator)
        branch = (
            uniform.mul_(1 - 0.5**self.branches)
            .neg_()
            .log1p_()
            .mul_(-1 / math.log(2))
            .long()
            .clamp_(max=self.branches - 1)
        )
        tokens = torch.randint(self.vocabulary, (self.length + 1, count), generator=generator)
        kept = torch.rand(self.length + 1, count, generator=generator) >= self.restart
        n, b, table = self.vocabulary, self.branches, self._successors
        before, last = tokens[0], tokens[1]
        rows = [before, last]
        for fresh, which, keep in zip(tokens[2:], branch[2:], kept[2:], strict=True):
            following = table[torch.add(torch.add(last, before, alpha=n).mul_(b), which)]
            before, last = last, torch.where(keep, following, fresh)
            rows.append(last)
        return torch.stack(rows, 1)


@dataclass(frozen=True, eq=False)
class Repeats(Sequences):
    """Uniform tokens that repeat with a period drawn for each sequence, 2 to `longest`; `noise`: replaced at random."""

    longest: int = 8
    noise: float = 0.0

    def _tokens(self, generator: Generator, count: int) -> Tensor:
        period = torch.randint(2, self.longest + 1, (count, 1), generator=generator)
        motif = torch.randint(self.vocabulary, (count, self.longest), generator=generator)
        tokens = motif.gather(1, torch.arange(self.length + 1) % period)
        if self.noise > 0:
            fresh = torch.randint(self.vocabulary, tokens.shape, generator=generator)
            tokens = torch.where(torch.rand(tokens.shape, generator=generator) < self.noise, fresh, tokens)
        return tokens


@dataclass(frozen=True, eq=False)
class Arithmetic(Sequences):
    """Expressions a op b c, one after another, with c = a + b or a - b modulo p; the operators are the last two tokens.

    p = vocabulary - 2. Each number is uniform, so that three tokens of four cannot be predicted but for their kind.
    """

    def _tokens(self, generator: Generator, count: int) -> Tensor:
        p, expressions = self.vocabulary - 2, self.length // 4 + 1
        a, b = torch.randint(p, (2, count, expressions), generator=generator)
        op = torch.randint(2, (count, expressions), generator=generator)
        c = (a + b - 2 * op * b) % p
        return torch.stack([a, p + op, b, c], -1).flatten(1)[:, : self.length + 1]


# ---------------------------------------------------------------------------------------- signals


@dataclass(frozen=True, eq=False)
class Waves(Stream):
    """Sums of two sinusoids of random frequency, amplitude and phase: x [length, 1], y the same moved by one.

    Frequencies are uniform between 0.1 and 1 radians per step, amplitudes between 0.5 and 1.5; Gaussian noise of
    standard deviation `noise` is added to x and y.
    """

    length: int
    noise: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, 1)

    @property
    def classes(self) -> int:
        raise TypeError("signals have no classes. Pass loss=mean_squared_error to the task.")

    def sample(self, generator: Generator, count: int) -> Batch:
        frequency, amplitude, phase = torch.rand(3, count, 1, 2, generator=generator)
        time = torch.arange(self.length + 1.0).unsqueeze(1)
        waves = (0.5 + amplitude) * torch.sin((0.1 + 0.9 * frequency) * time + 2 * math.pi * phase)
        signal = waves.sum(-1, keepdim=True)
        if self.noise > 0:
            signal = signal + self.noise * torch.randn(signal.shape, generator=generator)
        return signal[:, :-1], signal[:, 1:]
