"""What a task is, and the one concrete task: a supervised problem made of a model, data and a loss."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tasks.data import Batch, Data

Weights = dict[str, Tensor]

EVAL = 1024  # at most this many examples to measure a train loss on


class Task(Protocol):
    """One inner problem. All randomness comes from the (CPU) generators passed in."""

    name: str
    model: nn.Module
    """Template: its parameters have the names and shapes of `params`. It keeps no state (BatchNorm normalises by the
    batch, there is no dropout)."""
    steps: int
    """The horizon of use: how many steps a run of this task takes."""
    ceiling: float
    """The loss of a constant guess, for clipping and normalising."""

    def init(self, generator: Generator) -> Weights:
        """Fresh initial weights."""

    def batch(self, generator: Generator) -> Batch:
        """One training batch, augmentation and noise included."""

    def batches(self, generator: Generator, n: int) -> Batch:
        """n training batches, with a leading axis n."""

    def held_out(self) -> Batch:
        """A fixed batch that no training batch overlaps (<= 1024 examples, no augmentation)."""

    def train_eval(self) -> Batch:
        """A fixed sample of the training distribution to measure the train loss on (<= 1024 examples)."""

    def loss(self, params: Weights, batch: Batch) -> Tensor:
        """Scalar; pure, safe under vmap and double backward."""


TaskFamily = Callable[[Generator], Task]
"""A distribution of tasks: samples architecture, widths, batch size, initial scale, horizon."""


class Supervised:
    """Fit y = model(x) to a `Data`; classification unless the data is a reconstruction.

    Args:
        name: shown in logs and tables.
        build: returns the model; called once, with the global random state restored afterwards.
        data: see `tasks.data`.
        batch_size: examples of one batch.
        steps: the horizon of use.
        scale: factor on the initial weights of linear and convolutional layers.
        embed_std: standard deviation of initial embeddings.
        loss: from (output, y) to a scalar, `cross_entropy` or `mean_squared_error`.
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
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            self.model = build()
        self.name, self.data, self.batch_size, self.steps = name, data, batch_size, steps
        self.scale, self.embed_std = scale, embed_std
        self._loss = loss or cross_entropy
        self._initializers = initializers(self.model, scale, embed_std)
        self.model.load_state_dict(
            self.init(Generator().manual_seed(0))
        )  # a template that is the same each time

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        return f"{type(self).__name__}({self.name!r}, {size} parameters, batch {self.batch_size}, {self.steps} steps)"

    @functools.cached_property
    def ceiling(self) -> float:
        if self._loss is cross_entropy:
            return math.log(self.data.classes)
        _, y = self.train_eval()
        return float(y.var(0, correction=0).mean())  # of the best constant guess

    def init(self, generator: Generator) -> Weights:
        return {name: draw(generator) for name, draw in self._initializers.items()}

    def batch(self, generator: Generator) -> Batch:
        return self.data.sample(generator, self.batch_size)

    def batches(self, generator: Generator, n: int) -> Batch:
        examples = self.data.sample(generator, n * self.batch_size)
        return tuple(part.unflatten(0, (n, self.batch_size)) for part in examples)

    def held_out(self) -> Batch:
        return self.data.held_out()

    def train_eval(self) -> Batch:
        return self._train_eval

    @functools.cached_property
    def _train_eval(self) -> Batch:
        return self.data.sample(Generator().manual_seed(0), EVAL)

    def loss(self, params: Weights, batch: Batch) -> Tensor:
        x, y = batch
        return self._loss(functional_call(self.model, params, (x,)), y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over all labels y [...] of -log softmax(logits [..., classes])[y], in nats."""
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def mean_squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean over all entries of (output - y)^2."""
    return (output - y).square().mean()


# ---------------------------------------------------------------------------------------------- initial weights

Draw = Callable[[Generator], Tensor]


def initializers(model: nn.Module, scale: float = 1.0, embed_std: float = 0.02) -> dict[str, Draw]:
    """For every parameter of `model`, in its order, a function drawing an initial value from a generator.

    Linear and Conv2d: PyTorch's default, uniform of +-1 / sqrt(fan_in), the matrices times `scale`; before a sine the
    matrix is uniform of +-sqrt(6 / fan_in), which keeps unit variance through sines (Sitzmann et al. 2020, "Implicit
    Neural Representations with Periodic Activation Functions"). Normalisation: ones and zeros. Embedding:
    N(0, embed_std^2). Other parameters (positions): N(0, 0.02^2).
    """
    modules = list(model.named_modules())
    after = dict(
        zip([name for name, _ in modules], [module for _, module in modules[1:]] + [model])
    )
    found: dict[str, Draw] = {}
    for name, module in modules:
        for key, p in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            found[full] = _initializer(module, key, p, _is_sine(after[name]), scale, embed_std)
    return {name: found[name] for name, _ in model.named_parameters()}


def _initializer(
    module: nn.Module, key: str, p: Tensor, sine: bool, scale: float, embed_std: float
) -> Draw:
    shape = tuple(p.shape)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in = module.weight[0].numel()
        if key == "bias":
            return functools.partial(_uniform, shape, fan_in**-0.5)
        return functools.partial(
            _uniform, shape, scale * (math.sqrt(6 / fan_in) if sine else fan_in**-0.5)
        )
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        value = 1.0 if key == "weight" else 0.0
        return lambda generator: torch.full(shape, value)
    return functools.partial(
        _normal, shape, embed_std if isinstance(module, nn.Embedding) else 0.02
    )


def _uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _normal(shape: tuple[int, ...], std: float, generator: Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator)


class Sin(nn.Module):
    """sin(x), elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def _is_sine(module: nn.Module) -> bool:
    return isinstance(module, Sin)


# ----------------------------------------------------------------------------------------- sampling a task's choices

T = TypeVar("T")


def choice(generator: Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def log_uniform(generator: Generator, low: float, high: float) -> float:
    """A number between `low` and `high`, uniform in its logarithm."""
    return low * (high / low) ** float(torch.rand((), generator=generator))


def horizon(generator: Generator) -> int:
    """Steps of a sampled task: log-uniform between 200 and 1000."""
    return round(log_uniform(generator, 200, 1000))
