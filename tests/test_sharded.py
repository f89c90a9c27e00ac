"""fully_shard: a rank's shards move as the whole tensors of one process do, wherever their owners are.

In float64 trajectories are compared: rounding stays rounding. In float32 it does not, in one process neither: steps are
polar factors, which blow up what is small in a gradient, so that a batch in two halves ends elsewhere. There, one
process takes its steps from the gradients of the sharded run.
"""

import copy
import io

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from learned_opt import NFNOpt
from tests.processes import ranks  # noqa: F401

ROWS = 16  # of a batch, over all ranks


# ------------------------------------------------------------------------------------------ networks
class Residual(nn.Module):
    """Convolutions and normalisations, with a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(3))
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.norms[0](self.stem(x.view(-1, 3, 4, 4))).relu()
        h = h + self.second(self.norms[2](self.first(self.norms[1](h).relu())).relu())
        return self.head(h.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Tied(nn.Module):
    """A GPT whose head is its embedding."""

    def __init__(self, width=12, tokens=11, depth=2):
        super().__init__()
        self.embedding, self.places = nn.Embedding(tokens, width), nn.Embedding(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        h = self.embedding(x) + self.places.weight
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Experts(nn.Module):
    """Experts in one tensor, softly chosen."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 10) / 3), nn.Parameter(torch.randn(3, 10, 8) / 3)

    def forward(self, x):
        h = self.first(x).relu()
        out = torch.einsum("neh,ehd->ned", torch.einsum("nd,edh->neh", h, self.up).relu(), self.down)
        return self.last(h + (self.gate(h).softmax(-1)[..., None] * out).sum(1))


class Odd(nn.Module):
    """Few rows, one entry, rows that do not divide, a frozen layer, one that is not always used."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(6, 7), nn.Linear(7, 1), nn.Linear(1, 5)
        self.third, self.side, self.scale = nn.Linear(5, 3), nn.Linear(7, 3), nn.Parameter(torch.ones(1))
        self.frozen.requires_grad_(False)
        self.use_side = True

    def forward(self, x):
        h = self.first(x).relu()
        y = self.third(self.frozen(self.second(h)).tanh()) * self.scale
        return y + self.side(h) if self.use_side else y


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


MODELS = {"mlp": mlp, "resnet": Residual, "gpt": Tied, "experts": Experts, "odd": Odd}


def batch_of(kind, step, dtype):
    generator = torch.Generator().manual_seed(step)
    if kind == "gpt":
        x = torch.randint(11, (ROWS, 6), generator=generator)
        return x, x.roll(1, 1)
    x = torch.randn(ROWS, 48 if kind == "resnet" else 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, x[:, :3].sin()


def loss_of(model, kind, x, y):
    out = model(x)
    return nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()) if kind == "gpt" else (out - y).square().mean()


def model_of(kind, dtype):
    torch.manual_seed(1)
    return MODELS[kind]().to(dtype)


def mesh_of(count, hybrid=False):
    if hybrid:
        return init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("copies", "shards"))
    return init_device_mesh("cpu", (count,))


def sharded(model, mesh, **policies):
    """Every layer that may be is a unit of its own, as programs do it."""
    for m in model.modules():
        if isinstance(m, Block | nn.Conv2d) or (isinstance(m, nn.Linear) and not isinstance(model, Tied)):
            fully_shard(m, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def share(x, rank, count):
    return x.chunk(count)[rank]


def whole(tensors):
    return [t.full_tensor().detach().clone() if hasattr(t, "placements") else t.detach().clone() for t in tensors]


def distance(a, b):
    """Of two networks: the largest, over tensors, relative to the tensor."""
    return max(float((x - y).norm() / y.norm().clamp(min=1e-3)) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------- as in one process
def alone(kind, dtype, steps, hook=None, start=None):
    """The weights after a run in this process."""
    model = model_of(kind, dtype)
    optimizer = NFNOpt(model.parameters(), total_steps=60)
    for step in range(steps):
        optimizer.zero_grad()
        if hook is not None:
            hook(model, step)
        loss_of(model, kind, *batch_of(kind, step, dtype)).backward()
        if hook is not None:
            hook(model, step, after=True)
        optimizer.step()
    return model, optimizer


def spread_out(rank, kind, dtype, steps, hybrid=False, hook=None, policies=None):
    """The model and the optimizer after the same run on all ranks."""
    count = dist.get_world_size()
    model = sharded(model_of(kind, dtype), mesh_of(count, hybrid), **(policies or {}))
    optimizer = NFNOpt(model.parameters(), total_steps=60)
    train(rank, model, optimizer, kind, dtype, range(steps), hook)
    return model, optimizer


def train(rank, model, optimizer, kind, dtype, steps, hook=None):
    count = dist.get_world_size()
    for step in steps:
        optimizer.zero_grad()
        if hook is not None:
            hook(model, step)
        x, y = (share(t, rank, count) for t in batch_of(kind, step, dtype))
        loss_of(model, kind, x, y).backward()
        if hook is not None:
            hook(model, step, after=True)
        optimizer.step()


def differ(rank, kind, hybrid, hook, steps):
    model, optimizer = spread_out(rank, kind, torch.float64, steps, hybrid, hook)
    found = whole(model.parameters())
    if rank:
        return [0.0, 1.0]
    other, reference = alone(kind, torch.float64, steps, hook)
    assert optimizer.symmetry.to_dict()["scales"].keys() == reference.symmetry.to_dict()["scales"].keys()
    assert dict(optimizer.skipped_steps) == dict(reference.skipped_steps)
    return [
        distance(found, whole(other.parameters())),
        distance(found, whole(model_of(kind, torch.float64).parameters())),
    ]


def sometimes(model, step, after=False):
    """A layer is left out of some steps."""
    model.use_side = step == 0 or step % 3 != 1


def late(model, step, after=False):
    """A layer is not used at first."""
    model.use_side = step > 4


def poison(model, step, after=False):
    """A gradient with one NaN, in a row that one rank has; another one far too large."""
    if after and step == 5:
        for p in list(model.parameters())[:1]:
            grad = p.grad.to_local() if hasattr(p.grad, "placements") else p.grad
            grad[:1] = torch.nan if not dist.is_initialized() or dist.get_rank() == 0 else grad[:1]


@pytest.mark.parametrize(
    ("kind", "count", "hybrid", "hook", "steps"),
    [
        ("mlp", 2, False, None, 50),
        ("mlp", 4, True, None, 12),
        ("resnet", 2, False, None, 12),
        ("gpt", 2, False, None, 12),
        ("experts", 4, False, None, 12),
        ("odd", 4, False, sometimes, 25),
        ("odd", 4, True, late, 15),
        ("mlp", 2, False, poison, 12),
        *(
            pytest.param(kind, count, False, None, 50, marks=pytest.mark.slow)
            for kind in ("mlp", "resnet", "gpt", "experts")
            for count in (2, 4)
        ),
    ],
)
def test_a_sharded_network_trains_as_in_one_process(ranks, kind, count, hybrid, hook, steps):  # noqa: F811
    outcomes = ranks(differ, kind, hybrid, hook, steps, count=count)
    for outcome in outcomes:
        apart, moved = outcome.get()
        assert apart < 1e-8 and moved > 1e-2
