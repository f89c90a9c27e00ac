"""What a task is, and the concrete ones: `Problem`, of a model, a batch function and a loss; `Supervised`, on data."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tasks.data import Batch, Data
from tasks.init import initializers

Weights = dict[str, Tensor]


class TaskError(ValueError):
    """A task cannot be worked with; the message says what to change."""


class Task(Protocol):
    """One inner problem. All randomness comes from the (CPU) generators passed in."""

    name: str
    model: nn.Module
    """Template: its parameters have the names and shapes of `params`. It keeps no state
    (BatchNorm normalises by the batch, there is no dropout)."""
    steps: int
    """The horizon of use: how many steps a run of this task takes."""

    @property
    def ceiling(self) -> float:
        """The loss of a constant guess, for clipping and normalising; positive."""

    def init(self, generator: Generator) -> Weights:
        """Fresh initial weights."""

    def batch(self, generator: Generator) -> Batch:
        """One training batch, augmentation and noise included."""

    def batches(self, generator: Generator, n: int) -> Batch:
        """n training batches, with a leading axis n."""

    def held_out(self) -> Batch:
        """A fixed batch that no training batch overlaps (<= 1024 examples, no augmentation)."""

    def train_eval(self) -> Batch:
        """A fixed sample (<= 1024) of what `batch` draws from, to measure the train loss on."""

    def loss(self, params: Weights, batch: Batch) -> Tensor:
        """Scalar, never below zero; pure, safe under vmap and double backward."""


ROUNDING = 1e-6  # of the ceiling: a loss that is less than zero by no more than this is zero
POSITIVE = (
    "Losses are compared by their ratios, so they must stay positive: add a constant, such as the bound of the entropy "
    "(docs/tasks.md)."
)


def check_ceiling(task: Task) -> None:
    """Raises TaskError unless the ceiling, by which losses are divided, is positive and finite."""
    if not 0 < task.ceiling < math.inf:
        raise TaskError(
            f"task {task.name!r}: its ceiling (the loss of a constant guess, or of its initial weights) is "
            f"{task.ceiling:.4g}, which must be positive and finite. {POSITIVE}"
        )


def check_losses(task: Task, losses: Tensor) -> None:
    """Raises TaskError for a finite loss below zero: its ratio to another, and its logarithm, would mean nothing."""
    negative = losses[losses.isfinite() & (losses < -ROUNDING * task.ceiling)]
    if len(negative):
        raise TaskError(f"task {task.name!r} has a loss of {float(negative[0]):.4g}. {POSITIVE}")


TaskFamily = Callable[[Generator], Task]
"""A distribution of tasks: samples architecture, widths, batch size, initial scale, horizon."""


class Problem:
    """A task that is a model, a batch function and a loss: all that a user has to write.

    Args:
        name: shown in logs and tables.
        build: returns the model with fresh initial weights, drawn from the global random state as modules do (the
            state is seeded from the task's generator before, and restored afterwards).
        sample: (generator, count) -> examples, a tuple of tensors with a leading axis of `count`. The first of them is
            what the model is called with, for its symmetry.
        loss: (model, *examples) -> scalar, never below zero; `model` is a function, the module with the weights of the
            moment.
        batch_size: examples of one batch.
        steps: the horizon of use.
        held_out: () -> the fixed held-out examples (<= 1024). Default: a sample of its own, which is right for data
            that is generated afresh and wrong for a finite set that `sample` draws from.
        ceiling: the loss of a constant guess; default: the loss of the initial weights of seed 0.
        eval_size: examples of `train_eval`.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        sample: Callable[[Generator, int], Batch],
        loss: Callable[..., Tensor],
        *,
        batch_size: int,
        steps: int,
        held_out: Callable[[], Batch] | None = None,
        ceiling: float | None = None,
        eval_size: int = 1024,
    ) -> None:
        self.name, self.batch_size, self.steps = name, batch_size, steps
        self._build, self._sample, self._loss = build, sample, loss
        self._held_out = held_out or (lambda: self._fixed(1))
        self._ceiling, self._eval_size = ceiling, eval_size
        self.model = self._built(0)

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        return f"{type(self).__name__}({self.name!r}, {size} parameters, {self.steps} x {self.batch_size})"

    def _built(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build()

    def _fixed(self, seed: int) -> Batch:
        return self._examples(Generator().manual_seed(seed), self._eval_size)

    def _examples(self, generator: Generator, count: int) -> Batch:
        return self._checked(self._sample(generator, count), "sample")

    def _checked(self, examples: Batch, source: str) -> Batch:
        several = isinstance(examples, tuple | list)
        if not (several and examples and all(isinstance(x, Tensor) for x in examples)):
            kinds = f" of {', '.join(type(x).__name__ for x in examples) or 'nothing'}" if several else ""
            raise TaskError(
                f"task {self.name!r}: {source} must return a tuple of tensors, not {type(examples).__name__}{kinds}. "
                "Of a single tensor write `return x,`."
            )
        return examples

    @functools.cached_property
    def ceiling(self) -> float:
        if self._ceiling is not None:
            return self._ceiling
        with torch.no_grad():
            return float(self.loss(self.init(Generator().manual_seed(0)), self.train_eval()))

    def init(self, generator: Generator) -> Weights:
        seed = int(torch.randint(2**62, (), generator=generator))
        return {name: p.detach() for name, p in self._built(seed).named_parameters()}

    def batch(self, generator: Generator) -> Batch:
        return self._examples(generator, self.batch_size)

    def batches(self, generator: Generator, n: int) -> Batch:
        examples = self._examples(generator, n * self.batch_size)
        return tuple(part.unflatten(0, (n, self.batch_size)) for part in examples)

    def held_out(self) -> Batch:
        return self._held

    @functools.cached_property
    def _held(self) -> Batch:
        return self._checked(self._held_out(), "held_out")

    def train_eval(self) -> Batch:
        return self._train_eval

    @functools.cached_property
    def _train_eval(self) -> Batch:
        return self._fixed(0)

    def loss(self, params: Weights, batch: Batch) -> Tensor:
        return self._loss(lambda *x: functional_call(self.model, params, x), *batch)


class Supervised(Problem):
    """Fit y = model(x) to a `Data`; classification unless the data is a reconstruction.

    Args:
        name: shown in logs and tables.
        build: returns the model; its initial weights are drawn by `tasks.init.initializers`, whatever it begins with.
        data: see `tasks.data`.
        batch_size: examples of one batch.
        steps: the horizon of use.
        scale: factor on the initial weights of linear and convolutional layers.
        embed_std: standard deviation of initial embeddings.
        loss: from (output, y) to a scalar, `cross_entropy` or `mean_squared_error`.
        eval_size: examples of `train_eval`.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        data: Data,
        *,
        batch_size: int,
        steps: int,
        scale: float = 1.0,
        embed_std: float = 0.02,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        eval_size: int = 1024,
    ) -> None:
        self.data, self._compare = data, loss or cross_entropy
        super().__init__(
            name,
            build,
            data.sample,
            lambda model, x, y: self._compare(model(x), y),
            batch_size=batch_size,
            steps=steps,
            held_out=data.held_out,
            eval_size=eval_size,
        )
        self._initializers = initializers(self.model, scale, embed_std)
        # The template is the same each time, too.
        self.model.load_state_dict(self.init(Generator().manual_seed(0)))

    @functools.cached_property
    def ceiling(self) -> float:
        if self._compare is cross_entropy:
            return math.log(self.data.classes)
        _, y = self.train_eval()
        return float(y.var(0, correction=0).mean())  # of the best constant guess

    def init(self, generator: Generator) -> Weights:
        return {name: draw(generator) for name, draw in self._initializers.items()}


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over all labels y [...] of -log softmax(logits [..., classes])[y], in nats."""
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def mean_squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean over all entries of (output - y)^2."""
    return (output - y).square().mean()


# ------------------------------------------------------------------------ sampling a task's choices

T = TypeVar("T")


def choice(generator: Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def log_uniform(generator: Generator, low: float, high: float) -> float:
    """A number between `low` and `high`, uniform in its logarithm."""
    return low * (high / low) ** float(torch.rand((), generator=generator))


def horizon(generator: Generator, low: int = 200, high: int = 1000) -> int:
    """Steps of a sampled task: log-uniform between `low` and `high`."""
    return round(log_uniform(generator, low, high))
