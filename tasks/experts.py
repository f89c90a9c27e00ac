"""Mixtures of experts: several small networks, and a gate that says how much each of them counts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from tasks import data, streams
from tasks.data import Batch
from tasks.mlp import ACTIVATIONS, COMMON, mlp
from tasks.task import Supervised, Task, choice, horizon, log_uniform

SEEDS = 2**20  # of the regions and teachers of the family


@dataclass(frozen=True, eq=False)
class Regions(streams.Stream):
    """Gaussian inputs, cut into regions by random planes; in each another random teacher says the class.

    Args:
        teachers: one of every region, all of the same inputs and classes. The region is the largest of as many random
            linear functions.
    """

    teachers: tuple[streams.TeacherClasses, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.teachers[0].shape

    @property
    def classes(self) -> int:
        return self.teachers[0].classes

    def sample(self, generator: Generator, count: int) -> Batch:
        first = self.teachers[0]
        planes = torch.randn(first.inputs, len(self.teachers), generator=Generator().manual_seed(first.seed))
        x, _ = first.sample(generator, count)
        answers = torch.stack([teacher.answers(x) for teacher in self.teachers], 1)
        return x, answers[torch.arange(count), (x @ planes).argmax(1)].argmax(1)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "square": lambda logits: logits.square() / (logits.square().sum(-1, keepdim=True) + 1),
}


class Mixture(nn.Module):
    """The sum of experts' outputs, each weighted by a gate that sees the same input (Jacobs et al. 1991, "Adaptive
    Mixtures of Local Experts"): [..., fan_in] -> [..., fan_out].

    experts: how many; each is an MLP with `hidden` widths. gate: of `GATES`.
    """

    def __init__(self, fan_in: int, fan_out: int, *, experts: int, hidden: list[int], activation: str, gate: str):
        super().__init__()
        self.gate, self.weigh = nn.Linear(fan_in, experts), GATES[gate]
        self.experts = nn.ModuleList(mlp([fan_in, *hidden, fan_out], activation) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outputs * self.weigh(self.gate(x)).unsqueeze(-2)).sum(-1)


def classifier(name: str, source: data.Data, body: list[int], activation: str, **settings) -> Supervised:
    """Layers of `body` widths, then a `Mixture` that gives the classes of `source`; settings of both."""
    source = data.Flat(source)
    sizes = [*source.shape, *body]
    shape = {k: settings.pop(k) for k in ("experts", "hidden", "gate")}

    def build() -> nn.Sequential:
        before = [*mlp(sizes, activation), ACTIVATIONS[activation]()] if body else []
        return nn.Sequential(*before, Mixture(sizes[-1], source.classes, activation=activation, **shape))

    return Supervised(name, build, source, **settings)


def sample(generator: Generator) -> Task:
    """2 to 6 experts of 8 to 48 units, behind one layer or none, on digits, photographs or regions with teachers."""
    kind = choice(generator, ("digits", "photos", "regions"))
    noise = log_uniform(generator, 0.1, 0.5)
    source: data.Data
    if kind == "regions":
        inputs, classes = choice(generator, (24, 32, 48)), choice(generator, (4, 8))
        seed = choice(generator, range(SEEDS))
        regions = range(seed, seed + choice(generator, (2, 3, 4)))
        source = Regions(tuple(streams.TeacherClasses(inputs, (24,), classes, "tanh", seed=s) for s in regions))
    else:
        source = data.Noisy(data.digits() if kind == "digits" else data.photos(8, (2, 3)), noise)
    activation, gate = choice(generator, COMMON), choice(generator, tuple(GATES))
    experts, width = choice(generator, (2, 3, 4, 6)), choice(generator, (8, 16, 24, 32, 48))
    body = choice(generator, ([], [choice(generator, (24, 32, 48))]))
    return classifier(
        f"experts-{kind}-{gate}-{activation}-{experts}x{width}{'-behind' if body else ''}",
        source,
        body,
        activation,
        experts=experts,
        hidden=[width],
        gate=gate,
        batch_size=choice(generator, (32, 64, 128)),
        steps=horizon(generator),
        scale=log_uniform(generator, 0.5, 2.0),
    )
