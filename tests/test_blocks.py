"""Tensors as stacks of matrices and units as positions: against plain loops over units."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from learned_opt.blocks import layout_of
from learned_opt.rules.embedding import Embedding
from learned_opt.symmetry import Element, Label, Scale, Spec, Symmetry, independent
from learned_opt.symmetry.axes import Leaf, Prod, Sum
from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer
from tests.inferred import infer


def by_hand():
    """All kinds of axes that a tensor may have."""
    labels = {"u": Label(4), "h": Label(2), "d": Label(3, ("h",)), "e": Label(3, ("h",)), "w": Label(4), "x": Label(3)}
    u, h, d, e, w, x = (Leaf(x.size, n) for n, x in labels.items())
    heads, values = Prod((h, d)), Prod((h, e))
    specs = {
        "qkv": Spec((Sum((heads, heads, values)), u), ("out", "in")),
        "qkv.bias": Spec((Sum((heads, heads, values)),), ("out",)),
        "neox": Spec((Prod((h, Sum((d, d, e)))), u), ("out", "in")),
        "proj": Spec((u, values), ("out", "in")),
        "grouped": Spec((values, d, Leaf(2)), ("out", "in", "kernel")),  # a group reads its own channels
        "not grouped": Spec((values, x, Leaf(2)), ("out", "in", "kernel")),  # of the same shape
        "flat": Spec((w, Prod((u, Leaf(3)))), ("out", "in")),
        "conv": Spec((w, u, Leaf(2), Leaf(2)), ("out", "in", "kernel", "kernel")),
        "transposed": Spec((u, w, Leaf(2)), ("in", "out", "kernel")),
        "embed": Spec((Leaf(5), u), ("lookup", "out")),
        "recurrent": Spec((u, u), ("out", "in")),
        "bias": Spec((w,), ("out",)),
        "gain": Spec((u,), ("gain",)),
        "fixed": Spec((Leaf(3), Leaf(4)), ("out", "in")),
        "scalar": Spec((), ()),
    }
    return Symmetry(specs, labels)


def unlabelled():
    return Symmetry({"w": Spec((Leaf(3), Leaf(2)), ("out", "in")), "b": Spec((Leaf(3),), ("out",))})


NETWORKS = {
    "by hand": by_hand,
    "unlabelled": unlabelled,
    "mlp": lambda: infer(mlp([3, 4, 4, 2], "relu")),
    "cnn": lambda: infer(cnn((2, 4, 4), (3, 4), 2, "relu", norm=True)),
    "depthwise": lambda: infer(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 2, 1))),
    "transformer": lambda: infer(
        Transformer(nn.Embedding(5, 4), 3, 5, width=4, heads=2, depth=1, hidden=6, causal=True)
    ),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


def tensors_of(symmetry):
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(s.shape, generator=g, dtype=torch.float64) for n, s in symmetry.specs.items()}


def layout_for(symmetry):
    return layout_of(symmetry, tuple(symmetry.specs), torch.device("cpu"))


# ------------------------------------------------------------- membership, told by the group's action
def marked(axis, on):
    """The axis with one scale per permutation label, exponent 1, if ``on``."""
    if isinstance(axis, Leaf):
        return replace(axis, scale=((axis.label, 1),) if on and axis.label else ())
    if isinstance(axis, Prod):
        return Prod(tuple(marked(a, on) for a in axis.factors))
    return Sum(tuple(marked(a, on) for a in axis.parts))


def members(symmetry, side):
    """Per flat unit: ``{name: how often each entry belongs to it on that side}``."""
    here = {"rows": ("out", "gain"), "cols": ("in", "kernel", "lookup")}[side]
    specs = {
        n: Spec(tuple(marked(a, r in here) for a, r in zip(s.axes, s.roles, strict=True)), s.roles)
        for n, s in symmetry.specs.items()
    }
    twin = Symmetry(specs, symmetry.labels, {n: Scale("real", x.size, n) for n, x in symmetry.labels.items()})
    ones = {n: torch.ones(s.shape, dtype=torch.float64) for n, s in specs.items()}
    one, units = twin.identity(), []
    for name in symmetry.labels:
        for i in range(one.scales[name].numel()):
            table = one.scales[name].clone()
            table.view(-1)[i] = 2.0
            scaled = twin.act(Element(one.perms, {**one.scales, name: table}), ones)
            units.append({n: x.log2() for n, x in scaled.items()})
    return units


@every_network
def test_gather_and_scatter_are_inverse(network):
    symmetry = NETWORKS[network]()
    tensors, layout = tensors_of(symmetry), layout_for(symmetry)
    back = layout.scatter(layout.gather(tensors))
    assert list(back) == list(tensors)
    for n, x in tensors.items():
        assert torch.equal(back[n], x) and back[n].shape == x.shape


@every_network
def test_a_stack_holds_the_blocks_of_its_members(network):
    symmetry = NETWORKS[network]()
    tensors, layout = tensors_of(symmetry), layout_for(symmetry)
    blocks = {n: symmetry.split(n, x) for n, x in tensors.items()}
    for stack, x in zip(layout.stacks, layout.gather(tensors), strict=True):
        assert torch.equal(x, torch.cat([blocks[n][i] for n, i, _ in stack.members]))


@every_network
def test_some_packs_can_be_taken_and_replaced(network):
    symmetry = NETWORKS[network]()
    tensors, layout = tensors_of(symmetry), layout_for(symmetry)
    stacks = layout.gather(tensors)
    for some in (range(0, len(layout.packs), 2), [], range(len(layout.packs))):
        taken = dict(zip(some, layout.packed(stacks, some), strict=True))
        for i, xs in taken.items():
            assert all(torch.equal(x, tensors[n]) for n, x in zip(layout.packs[i].names, xs, strict=True))
        back = layout.scatter(layout.replaced(stacks, {i: -x for i, x in taken.items()}))
        negative = {n for i in some for n in layout.packs[i].names}
        assert all(torch.equal(x, -tensors[n] if n in negative else tensors[n]) for n, x in back.items())


def test_tensors_that_are_cut_alike_are_cut_at_once():
    """One cut for q, k and v of all layers; one for what is of the same shape and not cut."""
    model = Transformer(nn.Embedding(5, 8), 3, 5, width=8, heads=2, depth=3, hidden=12, causal=True)
    layout = layout_for(infer(model))
    packs = {n: pack for pack in layout.packs for n in pack.names}
    assert packs["blocks.0.attn.qkv.weight"].names == tuple(f"blocks.{i}.attn.qkv.weight" for i in range(3))
    assert packs["blocks.0.attn.proj.bias"].names == packs["blocks.2.fc2.bias"].names
    assert sorted(n for pack in layout.packs for n in pack.names) == sorted(layout.names)


def test_tensors_of_one_shape_are_no_pack_if_other_axes_are_hidden():
    model = mlp([8, 8, 8, 8], "tanh")
    layout = layout_for(infer(model))
    assert [pack.names for pack in layout.packs if pack.names[0].endswith("weight")] == [
        ("0.weight",),
        ("2.weight",),
        ("4.weight",),
    ]
    assert any({n for n, _, _ in s.members} == {"0.weight", "2.weight", "4.weight"} for s in layout.stacks)


def test_tensors_of_other_shapes_share_a_stack_and_keep_them():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 4))
    symmetry = independent(dict(model.named_parameters()))
    tensors, layout = tensors_of(symmetry), layout_for(symmetry)
    back = layout.scatter(layout.gather(tensors))
    assert any({n for n, _, _ in s.members} == {"0.weight", "2.weight"} for s in layout.stacks)
    assert all(torch.equal(back[n], x) for n, x in tensors.items())


@every_network
def test_a_stack_holds_one_kind_and_one_shape(network):
    symmetry = NETWORKS[network]()
    layout = layout_for(symmetry)
    stacks = layout.gather(tensors_of(symmetry))
    seen = [(n, i) for stack in layout.stacks for n, i, _ in stack.members]
    assert sorted(seen) == sorted((n, i) for n in symmetry.specs for i in range(len(symmetry.blocks[n])))
    keys = [(stack.kind, *stack.shape[1:]) for stack in layout.stacks]
    assert len(set(keys)) == len(keys)
    for stack, x in zip(layout.stacks, stacks, strict=True):
        assert x.shape == stack.shape and stack.fixed.shape == (stack.shape[0], 2)
        for units, length in ((stack.rows, stack.shape[1]), (stack.cols, stack.shape[2])):
            assert units.index.shape == units.exponent.shape and units.index.shape[:2] == (stack.shape[0], length)
        assert sum(batch for *_, batch in stack.members) == stack.shape[0]
        for n, i, batch in stack.members:
            block = symmetry.blocks[n][i]
            assert (block.kind, block.shape) == (stack.kind, (batch, *stack.shape[1:]))


def test_shapes_and_kinds_by_hand():
    symmetry = by_hand()
    layout = layout_for(symmetry)
    where = {(n, i): (stack.kind, stack.shape[1:], batch) for stack in layout.stacks for n, i, batch in stack.members}
    assert [where["qkv", i] for i in range(3)] == [("matrix", (6, 4), 1)] * 3
    assert [where["neox", i] for i in range(3)] == [("matrix", (6, 4), 1)] * 3
    assert where["grouped", 0] == ("matrix", (3, 6), 2)  # a batch of groups
    assert where["transposed", 0] == ("matrix", (4, 8), 1)
    assert where["conv", 0] == ("matrix", (4, 16), 1)
    assert where["embed", 0] == ("embedding", (4, 5), 1)
    assert where["bias", 0] == ("vector", (4, 1), 1) and where["gain", 0] == ("gain", (4, 1), 1)
    assert where["scalar", 0] == ("vector", (1, 1), 1)


@every_network
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_unit_sums_equal_a_loop_over_units(network, side):
    symmetry = NETWORKS[network]()
    tensors, layout = tensors_of(symmetry), layout_for(symmetry)
    naive = [sum((tensors[n] * m).sum().item() for n, m in unit.items()) for unit in members(symmetry, side)]
    assert layout.n_units == len(naive)
    total = torch.zeros(layout.n_units + 1, dtype=torch.float64)
    for stack, x in zip(layout.stacks, layout.gather(tensors), strict=True):
        units, sums = getattr(stack, side), x.sum(2 if side == "rows" else 1)
        for k in range(units.index.shape[-1]):
            total.index_add_(0, units.index[..., k].flatten(), sums.flatten())
    torch.testing.assert_close(total[:-1], torch.tensor(naive, dtype=torch.float64))


@every_network
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_pooled_means_equal_a_loop_over_units(network, side):
    """The means of the embedding: over rows (columns), each being the mean of its entries. No unit: zero."""
    symmetry = NETWORKS[network]()
    tensors, layout = tensors_of(symmetry), layout_for(symmetry)
    x = [torch.stack([t, t * t]) for t in layout.gather(tensors)]  # [F, N, R, C]
    pooled = Embedding(2, 0, 0, 3)._units(layout, [t.mean(3 if side == "rows" else 2) for t in x], side)
    width = {n: torch.ones(s.shape, dtype=torch.float64) for n, s in symmetry.specs.items()}
    other = 2 if side == "rows" else 1  # the number of entries in a row of the entry's own matrix
    width = layout.scatter([torch.full_like(t, t.shape[other]) for t in layout.gather(width)])
    for u, unit in enumerate(members(symmetry, side)):
        count = sum((m / width[n]).sum() for n, m in unit.items())
        for f in (1, 2):
            total = sum((tensors[n] ** f * m / width[n]).sum() for n, m in unit.items())
            torch.testing.assert_close(pooled[u, f - 1], total / max(count, torch.ones(())))


@every_network
def test_what_is_fixed_belongs_to_no_unit(network):
    symmetry = NETWORKS[network]()
    layout = layout_for(symmetry)
    for stack in layout.stacks:
        for i, units in enumerate((stack.rows, stack.cols)):
            nobody = (
                (units.index == layout.n_units).all(-1).all(-1)
                if units.index.shape[-1]
                else torch.ones(len(stack.fixed))
            )
            batched = torch.tensor([b > 1 for *_, b in stack.members for _ in range(b)])
            assert torch.equal(stack.fixed[:, i].bool() | batched, nobody.bool() | batched)


@every_network
def test_scale_units_act_like_the_group(network):
    """``prod scale^exponent`` over the units of an entry is what the group element multiplies it by."""
    symmetry = NETWORKS[network]()
    layout, one = layout_for(symmetry), symmetry.identity()
    g = Element(one.perms, symmetry.sample(torch.Generator().manual_seed(0)).scales)
    ones = {n: torch.ones(s.shape, dtype=torch.float64) for n, s in symmetry.specs.items()}
    flat = torch.cat([*(x.flatten() for x in g.scales.values()), torch.ones(1, dtype=torch.float64)])
    assert layout.n_scales + 1 == len(flat)
    for stack, expected in zip(layout.stacks, layout.gather(symmetry.act(g, ones)), strict=True):
        r, c = ((flat[u.index] ** u.exponent).prod(-1) for u in (stack.row_scales, stack.col_scales))
        torch.testing.assert_close(r.unsqueeze(2) * c.unsqueeze(1), expected)


def test_a_layout_of_some_tensors_knows_only_them():
    symmetry = by_hand()
    layout = layout_of(symmetry, ("neox", "bias"), torch.device("cpu"))
    tensors = tensors_of(symmetry)
    back = layout.scatter(layout.gather(tensors))
    assert list(back) == ["neox", "bias"] and torch.equal(back["neox"], tensors["neox"])
    assert layout.n_units == layout_for(symmetry).n_units
    assert layout is layout_of(symmetry, ("neox", "bias"), torch.device("cpu"))
    assert layout is not layout_of(by_hand(), ("neox", "bias"), torch.device("cpu"))
