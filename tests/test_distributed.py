"""Replicas stay equal to the bit, whatever differs between their ranks; what cannot be stepped is refused."""

import copy
import gc
import io
import re

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from learned_opt import NFNOpt, distributed
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
def wrapped(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def wrapped_and_frozen(model):
    """As programs do that spare the garbage collector what stays."""
    ddp = wrapped(model)
    gc.freeze()
    return ddp


def compiled(model):
    return torch.compile(wrapped(model), backend="eager")


def composed(model):
    return replicate(model, find_unused_parameters=True)


def train_ddp(rank, ways, wrap=wrapped):
    """Every rank goes its own ways: ``ways[rank]``, one step after the other."""
    model = Branches()
    ddp = wrap(model)
    optimizer = NFNOpt(model.parameters(), total_steps=60)
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


@pytest.mark.parametrize("wrap", [wrapped_and_frozen, compiled, composed])
def test_replicas_are_known_however_they_are_made(ranks, wrap):  # noqa: F811
    outcomes = ranks(train_ddp, [["closed", "left"], ["both"]], wrap)
    assert_equal_ranks(outcomes)
    assert "found no symmetry" in outcomes[0].said


def train_with_everything(rank):
    """Accumulation, a loss that is NaN on one rank, tensors without gradients, a group that is added, a resumed run."""
    model = Branches("left")
    model.unused = nn.Parameter(torch.ones(5, 5))
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    late = ("right", "last")
    named = list(model.named_parameters())
    optimizer = NFNOpt([(n, p) for n, p in named if not n.startswith(late)], total_steps=60)
    for step in range(STEPS):
        if step == 3:
            optimizer.add_param_group({"params": [(n, p) for n, p in named if n.startswith(late)]})
        if step == 8:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            optimizer = NFNOpt([(n, p) for n, p in named if not n.startswith(late)], total_steps=60)
            optimizer.add_param_group({"params": [(n, p) for n, p in named if n.startswith(late)]})
            saved.seek(0)
            optimizer.load_state_dict(torch.load(saved))
        optimizer.zero_grad()
        model.way = ("left", "right", "both")[(rank + step) % 3]
        with ddp.no_sync():
            loss_of(ddp, rank, 50 + step).backward()
        loss = loss_of(ddp, rank, step)
        (loss * torch.nan if step == 9 and rank == 1 else loss).backward()
        optimizer.step()
    assert set(optimizer.skipped_steps.values()) == {1}
    assert bool((model.unused == 1).all())
    return bits(model, optimizer)


def train_two_networks(rank):
    """As a GAN: a network, and another that is trained at every second step; each replicated, with its optimizer."""
    models = [Branches(), Branches("left")]
    ddps = [DistributedDataParallel(m, find_unused_parameters=True) for m in models]
    optimizers = [NFNOpt(d.parameters(), total_steps=60) for d in ddps]
    for step in range(STEPS):
        for i in range(1 + step % 2):
            optimizers[i].zero_grad()
            loss_of(ddps[i], rank, step).backward()
            optimizers[i].step()
    return torch.cat([bits(*both) for both in zip(models, optimizers, strict=True)])


def train_averaged_by_hand(rank):
    """Replicas without a wrapper, and a rank that cannot export its first batch."""
    model = Branches("closed" if rank == 0 else "both")
    optimizer = NFNOpt(model.parameters(), total_steps=60, process_group=dist.group.WORLD)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        optimizer.step()
        model.way = "both"
    assert any(len(g.over) or not g.fixed for g in optimizer.symmetry.labels.values())
    return bits(model, optimizer)


@pytest.mark.parametrize("train", [train_with_everything, train_two_networks, train_averaged_by_hand])
@pytest.mark.parametrize("count", [2, 4])
def test_replicas_stay_equal_through_a_whole_run(ranks, train, count):  # noqa: F811
    assert_equal_ranks(ranks(train, count=count))


def train_in_pairs(rank):
    """Two networks, each on two ranks and of a length of its own; a rank of the second cannot export its batch."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = Branches("closed" if rank == 3 else "both")
    ddp = DistributedDataParallel(model, process_group=pairs[rank // 2], find_unused_parameters=True)
    optimizer = NFNOpt(ddp.parameters(), total_steps=60)
    for step in range(3 + 5 * (rank // 2)):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
        model.way = "both"
    return bits(model, optimizer)


def test_ranks_agree_within_their_group_alone(ranks):  # noqa: F811
    outcomes = ranks(train_in_pairs, count=4)
    assert_equal_ranks(outcomes[:2])
    assert_equal_ranks(outcomes[2:])
    assert ["rank 1 found no symmetry" in o.said for o in outcomes] == [False, False, True, True]


# -------------------------------------------------------------------------- ranks with networks of their own
def train_alone(rank):
    """Nothing is replicated, so nothing may wait for another rank: this one takes as many steps as it likes."""
    model = nn.Sequential(nn.Linear(6, 8 + rank), nn.ReLU(), nn.Linear(8 + rank, 3))
    optimizer = NFNOpt(model.parameters())
    for step in range(5 * rank):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
    copied, twin = copy.deepcopy((model, optimizer))
    if rank == 0:
        loss_of(copied, rank, 0).backward()
        twin.step()
    return True


def test_ranks_that_train_networks_of_their_own_do_not_wait(ranks):  # noqa: F811
    assert all(o.get() for o in ranks(train_alone))


# ------------------------------------------------------------------------------------------ refusals
def step_of(model, rank, **options):
    optimizer = NFNOpt(model.parameters(), **options)
    loss_of(model, rank, 0).backward()
    optimizer.step()


def differ_in_gradients(rank):
    step_of(Branches(), rank, process_group=dist.group.WORLD)


def differ_in_parameters(rank):
    """As a rule that shards its tensors would."""
    model = DistributedDataParallel(Branches())
    optimizer = NFNOpt(list(model.parameters())[rank::2])
    loss_of(model, rank, 0).backward()
    optimizer.step()


def differ_in_symmetry(rank):
    model = DistributedDataParallel(Branches())
    from learned_opt import independent, infer_symmetry

    own = Branches()
    given = independent(dict(own.named_parameters())) if rank else infer_symmetry(own, batch(0, 0)[0])
    step_of(model, rank, symmetry=given)


def differ_in_state(rank):
    model = DistributedDataParallel(Branches())
    optimizer = NFNOpt(model.parameters())
    loss_of(model, rank, 0).backward()
    optimizer.step()
    again = NFNOpt(model.parameters())
    if rank == 0:
        again.load_state_dict(optimizer.state_dict())
    again.step()


def have_parameters_of_their_own(rank):
    """A replicated body, and an expert on every rank whose gradient is not averaged."""
    body, expert = DistributedDataParallel(nn.Linear(6, 6)), Branches()
    optimizer = NFNOpt([*body.parameters(), *expert.parameters()])
    loss_of(nn.Sequential(body, expert), rank, 0).backward()
    optimizer.step()


def belong_to_several_groups(rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    body = DistributedDataParallel(nn.Linear(6, 6))
    expert = DistributedDataParallel(Branches(), process_group=groups[rank])
    optimizer = NFNOpt([*body.parameters(), *expert.parameters()])
    loss_of(nn.Sequential(body, expert), rank, 0).backward()
    optimizer.step()


def sit_in_zero(rank):
    ZeroRedundancyOptimizer(DistributedDataParallel(Branches()).parameters(), NFNOpt)


def are_flattened(rank):
    NFNOpt(FullyShardedDataParallel(Branches(), device_id=torch.device("cpu")).parameters())


def are_flattened_but_look_original(rank):
    model = FullyShardedDataParallel(Branches(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = NFNOpt([nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="FullyShardedDataParallel"):
        optimizer.add_param_group({"params": list(model.parameters())})
    assert len(optimizer.param_groups) == 1
    NFNOpt(model.named_parameters())


def are_flattened_and_whole(rank):
    strategy = ShardingStrategy.NO_SHARD
    model = FullyShardedDataParallel(Branches(), sharding_strategy=strategy, device_id=torch.device("cpu"))
    NFNOpt([{"params": list(model.parameters())}])


def are_for_a_rule_that_needs_all(rank):
    model = fully_shard(Branches(), mesh=init_device_mesh("cpu", (2,)))
    NFNOpt([{"params": list(model.parameters())}], rule="learned")


def are_sharded_in_part(rank):
    model = Branches()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params={model.last.weight})
    NFNOpt(model.parameters())


def are_sharded_over_several_meshes(rank):
    models = [fully_shard(Branches(), mesh=m) for m in (init_device_mesh("cpu", (2,)), _hybrid())]
    optimizer = NFNOpt(models[0].parameters())
    with pytest.raises(RuntimeError, match="several meshes"):
        optimizer.add_param_group({"params": models[1].parameters()})
    NFNOpt([p for m in models for p in m.parameters()])


def _hybrid():
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))


def are_parallel_tensors(rank):
    mesh = init_device_mesh("cpu", (2,))
    plan = {"first": ColwiseParallel(), "last": RowwiseParallel()}
    NFNOpt(parallelize_module(Branches(), mesh, plan).parameters())


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (differ_in_gradients, "the gradients of 0, 1, 2.*differ between ranks.*Average them"),
        (differ_in_parameters, "other parameters on rank 1.*Give every rank all parameters"),
        (differ_in_symmetry, "another symmetry on some ranks.*Give all the same"),
        (differ_in_state, "another state on rank 1.*Load the state dict on every rank"),
        (have_parameters_of_their_own, "the gradients of 2, 3, .*an optimizer of their own"),
        (belong_to_several_groups, "several process groups.*an optimizer of their own"),
        (sit_in_zero, "ZeroRedundancyOptimizer.*Use NFNOpt with DistributedDataParallel"),
        (are_flattened, "FullyShardedDataParallel.*Use fully_shard"),
        (are_flattened_but_look_original, "FullyShardedDataParallel.*Use fully_shard"),
        (are_flattened_and_whole, "FullyShardedDataParallel.*Use fully_shard"),
        (are_for_a_rule_that_needs_all, 'Learned does not take sharded.*Use rule="auto_lr"'),
        (are_sharded_in_part, "7 parameters.*are sharded.*and 1 are not.*optimizer of their own"),
        (are_sharded_over_several_meshes, "several meshes.*optimizer of their own"),
        (are_parallel_tensors, "parallelize_module.*Use DistributedDataParallel"),
    ],
)
def test_what_would_drift_apart_is_refused_on_every_rank(ranks, attempt, said):  # noqa: F811
    for outcome in ranks(attempt):
        assert re.search(f"RuntimeError: .*{said}", outcome.error), outcome.error


# ------------------------------------------------------------------------------------ uneven inputs
def train_joined(rank, batches):
    """Every rank has as many batches as ``batches[rank]``."""
    distributed.PATIENCE = 3.0
    ddp = DistributedDataParallel(Branches())
    optimizer = NFNOpt(ddp.parameters(), total_steps=10)
    with ddp.join():
        for step in range(batches[rank]):
            optimizer.zero_grad()
            loss_of(ddp, rank, step).backward()
            optimizer.step()
    return bits(ddp, optimizer)[: sum(p.numel() for p in ddp.parameters())]


def test_ranks_may_have_other_numbers_of_batches(ranks):  # noqa: F811
    assert_equal_ranks(ranks(train_joined, [4, 4]))
    assert all(o.get().numel() for o in ranks(train_joined, [5, 2]))


@pytest.mark.slow  # the other rank waits in join() until it has had enough
def test_a_rank_without_batches_is_not_waited_for_in_silence(ranks):  # noqa: F811
    told = ranks(train_joined, [3, 0])[0].error
    assert "rank 1 took no first step" in told and "at least one batch" in told
