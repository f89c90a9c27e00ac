"""Tables of scikit-learn: quantiles by attention over features, contrasts of patients, and a density of wines."""

import functools
import math

import torch
from sklearn import datasets
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks.data import Batch
from tasks.held_out.layers import dense, join_heads, shrunk, split_heads
from tasks.task import Problem


@functools.cache
def table(name: str) -> tuple[Tensor, Tensor, int]:
    """Rows in a fixed random order, features [n, k] and target [n], standardised, and how many train: four fifths."""
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = torch.randperm(len(x), generator=Generator().manual_seed(0))
    x, y = (torch.tensor(part, dtype=torch.float32)[order] for part in (x, y))
    train = len(x) * 4 // 5
    x, y = ((part - part[:train].mean(0)) / part[:train].std(0) for part in (x, y))
    return x, y, train


# ---------------------------------------------------------------------------------------- diabetes

LEVELS = (0.1, 0.5, 0.9)


class FeatureTransformer(nn.Module):
    """Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular Data": every feature is a token, its value
    times a vector plus another; one more token reads. Rows [B, features] -> [B, outputs]."""

    def __init__(self, features: int, outputs: int, *, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.slope, self.shift = (nn.Parameter(torch.randn(features, width) / math.sqrt(width)) for _ in range(2))
        self.reader = nn.Parameter(torch.randn(1, width) / math.sqrt(width))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.feed = nn.ModuleList(dense([width, hidden, width], nn.ReLU) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1) * self.slope + self.shift
        h = torch.cat([self.reader.expand(*tokens.shape[:-2], 1, -1), tokens], -2)
        for i, (qkv, proj, feed) in enumerate(zip(self.qkv, self.proj, self.feed, strict=True)):
            q, k, v = (split_heads(y, self.heads) for y in qkv(self.norms[2 * i](h)).chunk(3, -1))
            h = h + proj(join_heads((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v))
            h = h + feed(self.norms[2 * i + 1](h))
        return self.head(functional.relu(self.norm(h[..., 0, :])))


def quantile_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean pinball loss of the quantiles LEVELS [B, 3] of y [B] (Koenker & Bassett 1978)."""
    error = y.unsqueeze(-1) - outputs
    return torch.maximum(error * torch.tensor(LEVELS).to(error), error * (torch.tensor(LEVELS).to(error) - 1)).mean()


def fttransformer_diabetes() -> Problem:
    """Three quantiles of how diabetes goes on, of patients whose features are seen with noise."""
    x, y, train = table("diabetes")

    def sample(generator: Generator, count: int) -> Batch:
        i = torch.randint(train, (count,), generator=generator)
        return x[i] + 0.2 * torch.randn(count, x.shape[1], generator=generator), y[i]

    return Problem(
        "fttransformer-diabetes",
        lambda: FeatureTransformer(x.shape[1], len(LEVELS), width=42, heads=3, hidden=76, depth=2),
        sample,
        lambda model, x, y: quantile_loss(model(x), y),
        batch_size=64,
        steps=800,
        held_out=lambda: (x[train:], y[train:]),
    )


# --------------------------------------------------------------------------------------- contrasts

GROUP, CORRUPTED, TEMPERATURE = 24, 0.5, 0.2


class Projector(nn.Module):
    """Two looks at GROUP rows, [B, GROUP, 2, features], as points on a sphere, [B, GROUP, 2, size]."""

    def __init__(self, features: int, width: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(dense([features, width, width], nn.ReLU), nn.ReLU())
        self.projector = dense([width, width // 2, size], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.projector(self.encoder(x)), dim=-1)


def contrast_loss(points: Tensor) -> Tensor:
    """Which of the second looks belongs to each first one, and back: points [B, n, 2, size] -> nats."""
    first, second = points.unbind(-2)
    logits = first @ second.transpose(-2, -1) / TEMPERATURE
    there, back = (a.log_softmax(-1).diagonal(dim1=-2, dim2=-1) for a in (logits, logits.transpose(-2, -1)))
    return -(there + back).mean() / 2


def scarf_cancer() -> Problem:
    """Bahri et al. 2022, "SCARF": the two looks at a patient have half of the features, others each time, replaced by
    those of any patient."""
    x, _, train = table("breast_cancer")

    def looks(rows: Tensor, generator: Generator, count: int) -> Batch:
        n, k = rows.shape
        i = torch.rand(count, n, generator=generator).topk(GROUP, 1).indices  # no row twice in a group
        shape = (count, GROUP, 2, k)
        other = rows[torch.randint(n, shape, generator=generator), torch.arange(k)]
        corrupted = torch.rand(shape, generator=generator) < CORRUPTED
        return (torch.where(corrupted, other, rows[i].unsqueeze(-2)),)

    return Problem(
        "scarf-cancer",
        lambda: Projector(x.shape[1], 116, 36),
        functools.partial(looks, x[:train]),
        lambda model, x: contrast_loss(model(x)),
        batch_size=8,
        steps=1200,
        held_out=lambda: looks(x[train:], Generator().manual_seed(0), 64),
        ceiling=math.log(GROUP),
        eval_size=128,
    )


# ------------------------------------------------------------------------------------------- wines

BLUR = 0.4


class Couplings(nn.Module):
    """Dinh et al. 2017, "Density Estimation Using Real NVP": every layer scales and moves every other feature by
    networks of the rest. Rows [B, k] -> the normal variables and the log of the volume, [B, k + 1]."""

    def __init__(self, features: int, width: int, depth: int) -> None:
        super().__init__()
        self.features = features
        sizes = [(features // 2, features - features // 2)[:: 1 if i % 2 else -1] for i in range(depth)]
        nets = (dense([given, width, width, 2 * moved], nn.ReLU) for given, moved in sizes)
        self.nets = nn.ModuleList(shrunk(net, 0.1) for net in nets)

    def forward(self, x: Tensor) -> Tensor:
        volume = torch.zeros_like(x[..., 0])
        a, b = x[..., ::2], x[..., 1::2]
        for net in self.nets:
            scale, shift = net(a).chunk(2, -1)
            scale = 2 * torch.tanh(scale / 2)
            a, b = b * torch.exp(scale) + shift, a
            volume = volume + scale.sum(-1)
        return torch.cat([a, b, volume.unsqueeze(-1)], -1)


def flow_wine() -> Problem:
    """The density of chemical analyses of wines, blurred by noise of BLUR: nats per feature above the entropy of the
    noise, which no density can fall below."""
    x, _, train = table("wine")
    features = x.shape[1]

    def blurred(rows: Tensor, generator: Generator, count: int) -> Batch:
        chosen = rows[torch.randint(len(rows), (count,), generator=generator)]
        return (chosen + BLUR * torch.randn(chosen.shape, generator=generator),)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        z, volume = model(x).split([features, 1], -1)
        surprise = z.square().mean(-1) / 2 + math.log(2 * math.pi) / 2 - volume.squeeze(-1) / features
        return surprise.mean() - math.log(2 * math.pi * math.e * BLUR**2) / 2

    return Problem(
        "flow-wine",
        lambda: Couplings(features, 60, 6),
        functools.partial(blurred, x[:train]),
        loss,
        batch_size=128,
        steps=1000,
        held_out=lambda: blurred(x[train:], Generator().manual_seed(0), 512),
    )
