"""Replicas stay equal to the bit, whatever differs between their ranks; what cannot be stepped is refused."""

import copy
import io

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from learned_opt import NFNOpt
from tests.processes import ranks  # noqa: F401

STEPS = 12


class Branches(nn.Module):
    """Two ways through the network; ``way`` says which. One of them cannot be exported."""

    def __init__(self, way="both"):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.way = way

    def forward(self, x):
        h = self.first(x).relu()
        if self.way == "closed" and float(h.sum().detach()) < 1e9:  # depends on data: not for torch.export
            return self.last(self.left(h).relu())
        if self.way in ("left", "both", "closed"):
            h = self.left(h).relu()
        if self.way in ("right", "both"):
            h = self.right(h).relu()
        return self.last(h)


def batch(rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(8, 6, generator=generator)
    return x, x[:, :3].sin()


def loss_of(model, rank, step):
    x, y = batch(rank, step)
    return nn.functional.mse_loss(model(x), y)


def bits(model, optimizer):
    """Of the weights and of the state, as one tensor."""
    parts = [p.detach().reshape(-1) for p in model.parameters()]
    parts += [x.reshape(-1).float() for p in model.parameters() for x in optimizer.state[p].values()]
    return torch.cat(parts).view(torch.int32)


def assert_equal_ranks(outcomes):
    values = [o.get() for o in outcomes]
    for other in values[1:]:
        assert other.shape == values[0].shape and bool((other == values[0]).all())


def assert_moved(outcomes):
    torch.manual_seed(0)
    start = torch.cat([p.detach().reshape(-1) for p in Branches().parameters()])
    found = outcomes[0].get()[: len(start)].view(torch.float32)
    assert 0.02 < float((found - start).abs().max()) < 10


# ------------------------------------------------------------------------------------------ replicas
def train_ddp(rank, ways, symmetry="infer"):
    """Every rank goes its own ways: ``ways[rank]``, one step after the other."""
    model = Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = NFNOpt(ddp.parameters(), total_steps=60, symmetry=symmetry)
    for step in range(STEPS):
        model.way = ways[rank][step % len(ways[rank])]
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    return bits(model, optimizer)


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        ([["both"], ["both"]], ""),
        ([["left", "right"], ["right", "left", "left"]], "different symmetries"),
        ([["both"], ["closed", "both"]], "rank 1 found no symmetry (inferring it failed"),
        ([["closed", "left"], ["both"]], "rank 0 found no symmetry (inferring it failed"),
        ([["closed"], ["closed"]], "every axis moves by itself"),
        ([["left"], ["both"], ["right"], ["closed", "both"]], "rank 3 found no symmetry"),
        ([["left"], ["left"], ["left"], ["left"]], "not read by this forward pass"),
    ],
)
def test_replicas_stay_equal_whatever_way_each_rank_goes(ranks, ways, said):  # noqa: F811
    outcomes = ranks(train_ddp, ways, count=len(ways))
    assert_equal_ranks(outcomes)
    assert_moved(outcomes)
    for outcome in outcomes:
        assert said in outcome.said if said else not outcome.said
