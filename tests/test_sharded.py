"""fully_shard: a rank's shards move as the whole tensors of one process do, wherever their owners are.

Runs are compared in float64, where rounding stays rounding. In float32 it does not, in one process neither: steps are
polar factors, which blow up what is small in a gradient, so that a batch in two halves ends elsewhere. There, runs of
small steps are compared, or one process takes its steps from the gradients of the sharded run.
"""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed._composable import checkpoint as checkpoint_activations
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
from tests.test_distributed import Branches
from tests.test_distributed import loss_of as branches_loss

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


MODELS = {"mlp": mlp, "resnet": Residual, "gpt": Tied, "experts": Experts, "odd": Odd, "deep": lambda: Deep()}


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
def alone(kind, dtype, steps, hook=None, lr=1.0):
    """The weights after a run in this process."""
    model = model_of(kind, dtype)
    optimizer = NFNOpt(model.parameters(), total_steps=60, lr=lr)
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
    """A gradient with NaN, in a row that one rank has, and one that is too large in the same way."""
    if after and step in (3, 5):
        p = list(model.parameters())[0 if step == 5 else 2]
        grad = p.grad.to_local() if hasattr(p.grad, "placements") else p.grad
        if not hasattr(p.grad, "placements") or p.device_mesh.get_local_rank() == 0:
            grad[:1] = torch.nan if step == 5 else 1e30


@pytest.mark.parametrize(
    ("kind", "count", "hybrid", "hook", "steps"),
    [
        ("mlp", 4, True, None, 8),
        ("gpt", 2, False, None, 6),
        ("experts", 2, False, None, 6),
        ("odd", 4, False, sometimes, 8),
        ("odd", 2, False, late, 8),
        ("mlp", 2, False, poison, 8),
        *(
            pytest.param(kind, count, False, None, 50, marks=pytest.mark.slow)
            for kind in ("mlp", "resnet", "gpt", "experts")
            for count in (2, 4)
        ),
        pytest.param("odd", 4, True, late, 15, marks=pytest.mark.slow),
        pytest.param("mlp", 4, False, poison, 8, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_network_trains_as_in_one_process(ranks, kind, count, hybrid, hook, steps):  # noqa: F811
    outcomes = ranks(differ, kind, hybrid, hook, steps, count=count)
    for outcome in outcomes:
        apart, moved = outcome.get()
        assert apart < 1e-8 and moved > 1e-2


# ----------------------------------------------------------------- float32: the same gradients, the same steps
POLICIES = {
    "plain": {},
    "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def follow(rank, kind, policy, dtype, steps):
    """How far one process ends from the sharded run whose gradients it takes."""
    seen = []

    def take(model, step, after=False):
        if after:
            seen.append(whole(p.grad for p in model.parameters()))

    model, optimizer = spread_out(rank, kind, dtype, steps, hook=take, policies=POLICIES[policy])
    found = whole(model.parameters())
    if rank:
        return 0.0
    other = model_of(kind, dtype)
    reference = NFNOpt(other.named_parameters(), total_steps=60, symmetry=optimizer.symmetry)
    for grads in seen:
        for p, grad in zip(other.parameters(), grads, strict=True):
            p.grad = grad
        reference.step()
    return distance(found, whole(other.parameters()))


@pytest.mark.parametrize(
    ("kind", "policy", "dtype", "count", "steps"),
    [
        pytest.param("gpt", "mixed", torch.float32, 2, 3, marks=pytest.mark.slow),
        ("mlp", "offloaded", torch.float64, 2, 8),
        ("mlp", "plain", torch.bfloat16, 2, 3),
    ],
)
def test_from_the_same_gradients_come_the_same_steps(ranks, kind, policy, dtype, count, steps):  # noqa: F811
    for outcome in ranks(follow, kind, policy, dtype, steps, count=count):
        assert outcome.get() < {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]


def step_softly(rank, kind, steps, lr):
    """In float32 and at a low rate, the distance from one process, and from the start."""
    count = dist.get_world_size()
    model = sharded(model_of(kind, torch.float32), mesh_of(count))
    optimizer = NFNOpt(model.parameters(), total_steps=60, lr=lr)
    train(rank, model, optimizer, kind, torch.float32, range(steps))
    found = whole(model.parameters())
    other = alone(kind, torch.float32, steps, lr=lr)[0] if rank == 0 else None
    start = whole(model_of(kind, torch.float32).parameters())
    return [0.0, 1.0] if other is None else [distance(found, whole(other.parameters())), distance(found, start)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "resnet", "gpt", "experts"])
@pytest.mark.parametrize("count", [2, 4])
def test_in_float32_small_steps_are_those_of_one_process(ranks, kind, count):  # noqa: F811
    for outcome in ranks(step_softly, kind, 50, 0.001, count=count):
        apart, moved = outcome.get()
        assert apart < 1e-5 and moved > 1e-4


# ------------------------------------------------------------------------------------- saving and loading
def states(model, optimizer, **options):
    options = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(rank, kind, folder):
    """Half a run, saved, and its end."""
    model, optimizer = spread_out(rank, kind, torch.float64, 6)
    checkpoint.save(states(model, optimizer), checkpoint_id=folder)
    train(rank, model, optimizer, kind, torch.float64, range(6, 12))
    return whole(model.parameters())


def load(rank, kind, folder):
    """The end of the run that was saved."""
    model = sharded(model_of(kind, torch.float64), mesh_of(dist.get_world_size()))
    optimizer = NFNOpt(model.parameters(), total_steps=60)
    state = states(model, optimizer)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(rank, model, optimizer, kind, torch.float64, range(6, 12))
    return whole(model.parameters())


def load_alone(kind, folder):
    model = model_of(kind, torch.float64)
    optimizer = NFNOpt(model.parameters(), total_steps=60)
    state = states(model, optimizer)
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for step in range(6, 12):
        optimizer.zero_grad()
        loss_of(model, kind, *batch_of(kind, step, torch.float64)).backward()
        optimizer.step()
    return whole(model.parameters())


@pytest.mark.parametrize("kind", ["mlp", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt", "experts"))])
def test_a_checkpoint_loads_on_another_number_of_ranks(ranks, kind, tmp_path):  # noqa: F811
    gone_on = ranks(save, kind, str(tmp_path), count=4)[0].get()
    for count in (4, 2):
        assert distance(ranks(load, kind, str(tmp_path), count=count)[0].get(), gone_on) < 1e-9
    assert distance(load_alone(kind, str(tmp_path)), gone_on) < 1e-9


@pytest.mark.slow
def test_a_checkpoint_of_one_process_loads_on_several_ranks(ranks, tmp_path):  # noqa: F811
    model, optimizer = alone("mlp", torch.float64, 6)
    checkpoint.save(states(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    gone_on = load_alone("mlp", tmp_path)
    assert distance(ranks(load, "mlp", str(tmp_path), count=4)[0].get(), gone_on) < 1e-9


def pass_whole(rank, kind):
    """A state dict in one piece on rank 0, loaded on all; and a state dict in shards."""
    model, optimizer = spread_out(rank, kind, torch.float64, 6)
    state = states(model, optimizer, full_state_dict=True, cpu_offload=True)
    own = optimizer.state_dict()
    train(rank, model, optimizer, kind, torch.float64, range(6, 12))
    found = [whole(model.parameters())]
    for way in ("broadcast", "own"):
        other = sharded(model_of(kind, torch.float64), mesh_of(dist.get_world_size()))
        again = NFNOpt(other.parameters(), total_steps=60)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, dict(state["model"]), options=options)
        if way == "broadcast":
            set_optimizer_state_dict(other, again, state["optimizer"], options=options)
        else:
            again.load_state_dict(own)
        train(rank, other, again, kind, torch.float64, range(6, 12))
        found.append(whole(other.parameters()))
    return [distance(found[0], x) for x in found[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_state_dict_in_one_piece_resumes_on_all_ranks(ranks, count):  # noqa: F811
    for outcome in ranks(pass_whole, "mlp", count=count):
        assert max(outcome.get()) < 1e-9


# ------------------------------------------------------------------------------- one symmetry on all ranks
def fail_to_export(rank, hybrid):
    """The forward pass of one rank depends on data at first."""
    model = sharded(Branches("closed" if rank == 1 else "left"), mesh_of(dist.get_world_size(), hybrid))
    optimizer = NFNOpt(model.parameters(), total_steps=60)
    for step in range(4):
        optimizer.zero_grad()
        branches_loss(model, rank, step).backward()
        optimizer.step()
        model.way = "left"
    assert any(not label.fixed for label in optimizer.symmetry.labels.values())
    return whole(model.parameters())


@pytest.mark.parametrize(("count", "hybrid"), [(2, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_a_rank_that_cannot_export_takes_the_symmetry_of_the_others(ranks, count, hybrid):  # noqa: F811
    outcomes = ranks(fail_to_export, hybrid, count=count)
    for outcome in outcomes:
        assert all(bool((a == b).all()) for a, b in zip(outcome.get(), outcomes[0].get(), strict=True))
    assert any("found no symmetry (inferring it failed" in o.said for o in outcomes)


def dress(rank):
    """As programs do: activations computed again, a layer compiled, a mesh kept in the model."""
    model = model_of("mlp", torch.float64)
    model.mesh = mesh_of(dist.get_world_size())
    checkpoint_activations(model[2])
    model[0].compile(backend="eager")
    sharded(model, model.mesh)
    optimizer = NFNOpt(model.parameters(), total_steps=60)
    train(rank, model, optimizer, "mlp", torch.float64, range(4))
    return set(optimizer.symmetry.scales), whole(model.parameters())


def test_the_symmetry_is_inferred_whatever_is_hooked_into_the_model(ranks):  # noqa: F811
    model, optimizer = alone("mlp", torch.float64, 4)
    for outcome in ranks(dress):
        scales, weights = outcome.get()
        assert scales == set(optimizer.symmetry.scales) and scales
        assert distance(weights, whole(model.parameters())) < 1e-8


def change_gradients(rank):
    """A penalty on the weights, far above the loss."""

    def penalise(model, step, after=False):
        for p in model.parameters() if after else ():
            p.grad.add_(p.detach(), alpha=10)

    model, optimizer = spread_out(rank, "mlp", torch.float64, 4, hook=penalise)
    return {s.kind for s in optimizer.symmetry.scales.values()}, whole(model.parameters())


def test_scales_that_the_gradients_break_are_not_used(ranks):  # noqa: F811
    for outcome in ranks(change_gradients):
        assert not outcome.get()[0] & {"positive", "real"}
        assert "the loss is not constant along the scales" in outcome.said


# ----------------------------------------------------------------------------------------------- memory
class Deep(nn.Sequential):
    """Enough matrices that they can be shared out evenly."""

    def __init__(self):
        super().__init__(nn.Linear(6, 24))
        for i in range(8):
            self.append(nn.Sequential(nn.Tanh(), nn.Linear(24, 24 + 2 * (i % 2)), nn.Linear(24 + 2 * (i % 2), 24)))
        self.append(nn.Linear(24, 3))


def held(optimizer):
    """Bytes of the state on this rank."""
    tensors = [x for slots in optimizer.state.values() for x in slots.values() if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def weigh(rank):
    return held(spread_out(rank, "deep", torch.float32, 4)[1])


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rank_holds_its_share_of_the_state(ranks, count):  # noqa: F811
    one = held(alone("deep", torch.float32, 4)[1])
    for outcome in ranks(weigh, count=count):
        assert outcome.get() <= 1.2 * one / count
