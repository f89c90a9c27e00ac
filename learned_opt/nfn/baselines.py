"""Baselines: statistics of weights, flattened weights, and a graph network on neurons and weights."""

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features

STATISTICS = 7


def statistics(features: Features) -> Tensor:
    """Mean, unbiased variance and the five quartiles of every tensor: ``[batch, channels, 7 * tensors]``.

    Unterthiner et al. 2020; invariant to any permutation of entries. A tensor with one entry has variance 0.
    """
    quartiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    parts = []
    for x in features.values():
        flat = x.flatten(2)
        q = torch.quantile(flat, quartiles.to(flat), dim=-1)
        variance = flat.var(-1, correction=1 if flat.shape[-1] > 1 else 0)
        parts.append(torch.stack([flat.mean(-1), variance, *q], -1))
    return torch.cat(parts, -1)


class StatNN(nn.Module):
    """:func:`statistics` of a chain's parameters, flattened: ``[batch, channels * outputs]``."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain, self.outputs = chain, STATISTICS * len(chain.names)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, channels * outputs]``."""
        self.chain.validate(features)
        return statistics({n: features[n] for n in self.chain.names}).flatten(1)


class FlatWeights(nn.Module):
    """All weights side by side, channels fastest: ``[batch, numbers * channels]``; knows no symmetry."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain
        self.sizes = [torch.Size(chain.shapes[n]).numel() for n in chain.names]
        self.outputs = sum(self.sizes)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, outputs * channels]``."""
        self.chain.validate(features)
        return torch.cat([features[n].flatten(2).mT for n in self.chain.names], 1).flatten(1)

    def inverse(self, flat: Tensor) -> Features:
        """``[batch, outputs]`` -> features with one channel."""
        parts = flat.split(self.sizes, 1)
        shapes = self.chain.shapes
        return {n: p.unflatten(1, (1, *shapes[n])) for n, p in zip(self.chain.names, parts, strict=True)}


class _Round(nn.Module):
    """One round of message passing: edges hear their ends, units hear their edges from both sides.

    The last round leaves the edges as they are: nobody reads them.
    """

    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        self.own, self.source, self.target = (nn.Linear(width, width) for _ in range(3))
        self.edge = None if last else nn.Linear(width, width)
        self.unit = nn.Sequential(nn.Linear(5 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, units: list[Tensor], edges: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        messages = [
            torch.relu(self.own(e) + self.source(units[i]).unsqueeze(1) + self.target(units[i + 1]).unsqueeze(2))
            for i, e in enumerate(edges)
        ]
        new = []
        for i, h in enumerate(units):
            none = torch.zeros_like(h)
            below = [messages[i - 1].mean(2), messages[i - 1].amax(2)] if i else [none, none]
            above = [messages[i].mean(1), messages[i].amax(1)] if i < len(edges) else [none, none]
            new.append(self.norm(h + self.unit(torch.cat([h, *below, *above], -1))))
        if self.edge is not None:
            edges = [e + self.edge(m) for e, m in zip(edges, messages, strict=True)]
        return new, edges


class GraphPool(nn.Module):
    """Message passing on the network as a graph: units are nodes, weights are edges (Kofinas et al. 2024, smaller).

    Equivariant to permutations of hidden units only: inputs, outputs and layers have learned embeddings. Messages are
    pooled by mean and maximum from both sides; the output nodes and the mean hidden nodes are read out.

    Args:
        chain: the network.
        in_channels: channels of the features.
        width: size of node and edge states.
        rounds: rounds of message passing.
    """

    def __init__(self, chain: Chain, in_channels: int = 1, width: int = 32, rounds: int = 4) -> None:
        super().__init__()
        self.chain = chain
        self.inputs = nn.Parameter(torch.randn(chain.n_in, width))
        self.outputs_of = nn.Parameter(torch.randn(chain.n_out, width))
        self.hidden = nn.Parameter(torch.randn(chain.depth - 1, width))
        self.bias = nn.Linear(in_channels, width)
        self.weights = nn.ModuleList([nn.Linear(in_channels * x.filters, width) for x in chain.layers])
        self.rounds = nn.ModuleList([_Round(width, last=i == rounds - 1) for i in range(rounds)])
        self.outputs = width * (chain.n_out + 1)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, outputs]``."""
        chain = self.chain
        chain.validate(features)
        batch = len(features[chain.names[0]])
        embed = [self.inputs, *self.hidden.unsqueeze(1), self.outputs_of]
        units, edges = [embed[0].expand(batch, -1, -1)], []
        for i, (layer, read) in enumerate(zip(chain.layers, self.weights, strict=True)):
            edges.append(read(layer.rows(features[layer.weight]).permute(1, 2, 3, 0)))
            own = embed[i + 1].expand(batch, layer.n_out, -1)
            units.append(own if layer.bias is None else own + self.bias(features[layer.bias].mT))
        for step in self.rounds:
            units, edges = step(units, edges)
        return torch.cat([units[-1].flatten(1), torch.cat(units[1:-1], 1).mean(1)], 1)
