"""Graph attention on all small connected graphs."""

import functools
import math

import networkx
import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks.data import Batch
from tasks.held_out.layers import dense
from tasks.task import Problem, mean_squared_error

NODES = 7


def invariants(graph: networkx.Graph) -> list[float]:
    """Algebraic connectivity, log of the number of spanning trees, mean distance, log(1 + triangles), largest degree.

    graph: connected, of at least two nodes.
    """
    laplacian = np.linalg.eigvalsh(networkx.laplacian_matrix(graph).toarray().astype(float))
    return [
        float(laplacian[1]),
        float(np.log(laplacian[1:]).sum() - math.log(len(laplacian))),  # Kirchhoff's matrix-tree theorem
        networkx.average_shortest_path_length(graph),
        math.log1p(sum(networkx.triangles(graph).values()) // 3),
        float(max(degree for _, degree in graph.degree)),
    ]


@functools.cache
def atlas() -> tuple[Tensor, Tensor]:
    """The 992 connected graphs of 4 to 7 nodes in the atlas of Read & Wilson, in a fixed random order.

    Adjacency matrices [n, 7, 7] with a one on the diagonal for every node that is there, and `invariants` [n, 5],
    standardised.
    """
    graphs = [g for g in networkx.graph_atlas_g() if len(g) >= 4 and networkx.is_connected(g)]
    x = torch.zeros(len(graphs), NODES, NODES)
    for matrix, graph in zip(x, graphs, strict=True):
        n = len(graph)
        matrix[:n, :n] = torch.tensor(networkx.to_numpy_array(graph)) + torch.eye(n)
    y = torch.tensor([invariants(g) for g in graphs])
    order = torch.randperm(len(graphs), generator=Generator().manual_seed(0))
    return x[order], ((y - y.mean(0)) / y.std(0))[order]


class GraphAttention(nn.Module):
    """h + elu(attention over the neighbours and oneself), Brody et al. 2022, "How Attentive are Graph Attention
    Networks?", equation 7: the score of an edge is a . leaky_relu(left h_i + right h_j).

    Nodes h [B, n, heads * size], edges [B, n, n].
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        width, self.heads = heads * size, heads
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.score = nn.Parameter(torch.randn(heads, size) / math.sqrt(size))

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        left, right = (x.unflatten(-1, (self.heads, -1)) for x in (self.left(h), self.right(h)))
        both = functional.leaky_relu(left.unsqueeze(-3) + right.unsqueeze(-4), 0.2)  # B, n, n, heads, size
        score = (both * self.score).sum(-1).masked_fill(edges.unsqueeze(-1) == 0, -1e4)
        mixed = (score.softmax(-2).unsqueeze(-1) * right.unsqueeze(-4)).sum(-3)
        return h + functional.elu(mixed.flatten(-2))


class GraphAttentionNetwork(nn.Module):
    """Graphs [B, 7, 7] -> `outputs` numbers [B, outputs]; a node begins as its degree."""

    def __init__(self, heads: int, size: int, depth: int, outputs: int) -> None:
        super().__init__()
        width = heads * size
        self.embed = nn.Linear(2, width)
        self.layers = nn.ModuleList(GraphAttention(heads, size) for _ in range(depth))
        self.head = dense([2 * width, width, outputs], nn.ELU)

    def forward(self, x: Tensor) -> Tensor:
        there = x.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        h = self.embed(torch.cat([there, x.sum(-1, keepdim=True) / NODES], -1))
        edges = torch.maximum(x, torch.eye(NODES).to(x))  # what is not there sees itself, and is not read
        for layer in self.layers:
            h = layer(h, edges)
        h = h * there
        return self.head(torch.cat([h.sum(-2) / NODES, h.sum(-2) / there.sum(-2)], -1))


def gat_atlas() -> Problem:
    """Invariants of small graphs; one fifth of the graphs is held out."""
    x, y = atlas()
    train = len(x) * 4 // 5

    def sample(generator: Generator, count: int) -> Batch:
        i = torch.randint(train, (count,), generator=generator)
        return x[i], y[i]

    return Problem(
        "gat-atlas",
        lambda: GraphAttentionNetwork(heads=4, size=15, depth=3, outputs=5),
        sample,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=32,
        steps=1200,
        held_out=lambda: (x[train:], y[train:]),
        ceiling=1.0,
    )
