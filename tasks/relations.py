"""Graph networks on random graphs that never repeat: what spreads along edges, and who belongs together."""

import functools
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from tasks import streams
from tasks.data import Batch
from tasks.mlp import ACTIVATIONS, COMMON, mlp
from tasks.task import Supervised, Task, choice, horizon, log_uniform, mean_squared_error

# ---------------------------------------------------------------------------------------- the graphs


@dataclass(frozen=True, eq=False)
class Graphs(streams.Stream):
    """Graphs of `nodes` nodes, x [nodes, nodes + features]: the adjacency matrix beside what is known of each node."""

    nodes: int
    features: int
    noise: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.nodes, self.nodes + self.features)


@dataclass(frozen=True, eq=False)
class Spreading(Graphs):
    """Nodes at random places of the unit square, joined where they are near; y [nodes, features]: what their values
    become when they flow along the edges, in eight steps of v_i + rate * mean_j(tanh(2 v_j) - v_i), doubled.

    The values at the start are normal; Gaussian noise of standard deviation `noise` is added to y.
    """

    radius: float = 0.45
    rate: float = 0.3

    @property
    def classes(self) -> int:
        raise TypeError("values have no classes. Pass loss=mean_squared_error to the task.")

    def sample(self, generator: Generator, count: int) -> Batch:
        place = torch.rand(count, self.nodes, 2, generator=generator)
        edges = (torch.cdist(place, place) < self.radius).float() - torch.eye(self.nodes)
        start = torch.randn(count, self.nodes, self.features, generator=generator)
        share, y = edges / edges.sum(-1, keepdim=True).clamp(min=1), start
        joined = share.sum(-1, keepdim=True)  # 0 for a node without neighbours, else 1
        for _ in range(8):
            y = y + self.rate * (share @ torch.tanh(2 * y) - joined * y)
        y = 2 * y + self.noise * torch.randn(y.shape, generator=generator)
        return torch.cat([edges, start], -1), y


@dataclass(frozen=True, eq=False)
class Communities(Graphs):
    """Nodes of `features` groups, joined with probability `inside` in a group and `across` between two; y [nodes]: the
    groups. A third of the nodes shows its group, one-hot; Gaussian noise of `noise` is added to what is known."""

    inside: float = 0.7
    across: float = 0.1

    @property
    def classes(self) -> int:
        return self.features

    def sample(self, generator: Generator, count: int) -> Batch:
        y = torch.randint(self.features, (count, self.nodes), generator=generator)
        same = y.unsqueeze(-1) == y.unsqueeze(-2)
        chance = torch.where(same, self.inside, self.across)
        upper = (torch.rand(chance.shape, generator=generator) < chance).float().triu(1)
        shown = torch.rand(count, self.nodes, 1, generator=generator) < 1 / 3
        known = nn.functional.one_hot(y, self.features) * shown
        known = known + self.noise * torch.randn(known.shape, generator=generator)
        return torch.cat([upper + upper.transpose(-2, -1), known], -1), y


# -------------------------------------------------------------------------------------- the network


class Convolution(nn.Module):
    """act(own h_i + other mean_j h_j) over the neighbours j, nodes [..., n, fan_in] and edges [..., n, n]."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.act = ACTIVATIONS[activation]()

    def forward(self, h: Tensor, share: Tensor) -> Tensor:
        return self.act(self.own(h) + self.other(share @ h))


class Messages(nn.Module):
    """update(h_i, mean_j act(target h_i + source h_j)) over the neighbours j (Gilmer et al. 2017, "Neural Message
    Passing for Quantum Chemistry")."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.target, self.source = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.act, self.update = ACTIVATIONS[activation](), mlp([2 * width, width, width], activation)

    def forward(self, h: Tensor, share: Tensor) -> Tensor:
        messages = self.act(self.target(h).unsqueeze(-2) + self.source(h).unsqueeze(-3))
        return self.update(torch.cat([h, (share.unsqueeze(-1) * messages).sum(-2)], -1))


LAYERS = {"convolution": Convolution, "messages": Messages}


class GraphNetwork(nn.Module):
    """A linear map of what is known of each node, `depth` residual layers, a linear head: [B, nodes, nodes + features]
    -> [B, nodes, outputs].

    kind: of `LAYERS`; norm: LayerNorm before each layer and the head.
    """

    def __init__(
        self, nodes: int, features: int, outputs: int, *, kind: str, width: int, depth: int, activation: str, norm: bool
    ) -> None:
        super().__init__()
        self.nodes = nodes
        self.embed = nn.Linear(features, width)
        self.layers = nn.ModuleList(LAYERS[kind](width, activation) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(depth + 1))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        edges, h = x[..., : self.nodes], self.embed(x[..., self.nodes :])
        share = edges / edges.sum(-1, keepdim=True).clamp(min=1)
        for norm, layer in zip(self.norms[:-1], self.layers, strict=True):
            h = h + layer(norm(h), share)
        return self.head(self.norms[-1](h))


def graph_task(name: str, source: Graphs, **settings) -> Supervised:
    """A `GraphNetwork` that tells of every node of `source`; its sizes and settings of `Supervised`."""
    values = isinstance(source, Spreading)
    shape = {k: settings.pop(k) for k in ("kind", "width", "depth", "activation", "norm")}
    build = functools.partial(GraphNetwork, source.nodes, source.features, source.features, **shape)
    return Supervised(name, build, source, loss=mean_squared_error if values else None, eval_size=512, **settings)


def sample(generator: Generator) -> Task:
    """1 to 3 layers of width 12 to 48 on graphs of 8 to 12 nodes: values that spread, or communities."""
    nodes = choice(generator, (8, 10, 12))
    noise = choice(generator, (0.0, log_uniform(generator, 0.03, 0.3)))
    source: Graphs
    if choice(generator, (True, False)):
        radius, rate = log_uniform(generator, 0.3, 0.7), log_uniform(generator, 0.1, 0.5)
        source = Spreading(nodes, choice(generator, (1, 2, 4)), noise, radius, rate)
    else:
        across = log_uniform(generator, 0.03, 0.3)
        source = Communities(nodes, choice(generator, (2, 3, 4)), noise, choice(generator, (0.6, 0.8)), across)
    shape = {"width": choice(generator, (12, 16, 24, 32, 48)), "depth": choice(generator, (1, 2, 3))}
    kind, activation = choice(generator, tuple(LAYERS)), choice(generator, COMMON)
    return graph_task(
        f"stream-{type(source).__name__.lower()}-{kind}-{activation}-{'-'.join(map(str, shape.values()))}",
        source,
        **shape,
        kind=kind,
        activation=activation,
        norm=choice(generator, (True, False)),
        batch_size=choice(generator, (8, 16, 32)),
        steps=horizon(generator, 100, 2000),
        scale=log_uniform(generator, 0.5, 1.4),
    )
