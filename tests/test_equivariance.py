"""The theorem: trained from g.theta, a network follows exactly g.(the network trained from theta)."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from learned_opt.optimizer import NFNOpt
from learned_opt.rules import make_rule as named_rule
from learned_opt.rules.whitened_polar import WhitenedPolar
from learned_opt.symmetry import Element, Scale, Spec, Symmetry, independent
from learned_opt.symmetry.axes import Leaf
from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer
from tests.inferred import infer
from tests.rules.classic import Adam

STEPS = 50
WIDE = (1e-2, 1e2)  # scales of hidden units, log-uniform


def transformer(**settings):
    sizes = {"width": 8, "heads": 2, "depth": 1, "hidden": 12, "causal": True}
    return Transformer(nn.Embedding(7, 8), 6, 7, **(sizes | settings))


class Heads(nn.Module):
    """Hidden units in heads: weights with more than two axes, whose rows are two of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.read, self.write = (nn.Parameter(torch.randn(3, 6, n) / 3) for n in (5, 3))

    def forward(self, x):
        return torch.einsum("bhu,huc->bc", torch.einsum("bi,hui->bhu", self.first(x), self.read).relu(), self.write)


def groups():
    """What each group of a convolution reads has a permutation of its own."""
    layers = nn.Conv2d(2, 12, 1), nn.ReLU(), nn.Conv2d(12, 10, 1, groups=2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(10 * 36, 3))


class Norms(nn.Module):
    """A normalisation over several axes: gains with two axes on one side, and biases that are read like a table."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 12), nn.LayerNorm([3, 4]), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x).view(-1, 3, 4)).relu()).sum(1)


MODELS = {
    "heads": Heads,
    "norms": Norms,
    "groups": groups,
    "relu": lambda: mlp([5, 8, 7, 3], "relu"),
    "tanh": lambda: mlp([5, 8, 7, 3], "tanh"),
    "sin": lambda: mlp([5, 8, 7, 3], "sin"),
    "cnn": lambda: cnn((2, 6, 6), (4, 5), 3, "relu", norm=True),
    "cnn without norm": lambda: cnn((2, 6, 6), (4, 5), 3, "relu", pool="avg"),
    "transformer": lambda: transformer(activation="gelu"),
    "transformer, q k v apart": lambda: transformer(activation="relu", fused=False),
}
FEATURES = {"cnn": (2, 6, 6), "cnn without norm": (2, 6, 6), "groups": (2, 6, 6)}


def make_model(kind, dtype=torch.float64):
    """Away from the start, where biases before a norm, gains and positions are all alike."""
    torch.manual_seed(1)
    model = MODELS[kind]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def minibatch(kind, step, dtype=torch.float64):
    """A new batch every step, of inputs with something to learn about them."""
    g = torch.Generator().manual_seed(step)
    if kind.startswith("transformer"):
        x = torch.randint(0, 7, (6, 6), generator=g)
        return x, (x + x.roll(1, -1)) % 7
    x = torch.randn(16, *FEATURES.get(kind, (5,)), generator=g, dtype=torch.float64).to(dtype)
    return x, x.flatten(1)[:, :3].argmax(-1)


def make_rule(rule):
    return copy.deepcopy(named_rule(rule))


def train(model, kind, rule, symmetry, steps=STEPS, lr=1.0, factor=1.0):
    """A plain loop; returns the losses."""
    optimizer = NFNOpt(model.named_parameters(), symmetry=symmetry, rule=make_rule(rule), total_steps=steps, lr=lr)
    dtype, losses = next(model.parameters()).dtype, []
    for step in range(steps):
        x, y = minibatch(kind, step, dtype)
        loss = cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        (factor * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def distance(a, b, symmetry):
    """Largest distance of two sets of weights, over blocks, relative to the block if that is more than rounding."""
    return max(
        float(torch.linalg.vector_norm(x - y) / max(float(torch.linalg.vector_norm(x)), 1e-6))
        for n in a
        for x, y in zip(symmetry.split(n, a[n]), symmetry.split(n, b[n]), strict=True)
    )


def element(symmetry, only=None):
    """A random group element: all of it, or only its permutations, signs or scales."""
    g, one = symmetry.sample(torch.Generator().manual_seed(2), scale_range=WIDE), symmetry.identity()
    if only == "permutations":
        return Element(g.perms, one.scales)
    if only == "signs":
        return Element(g.perms, {n: x.sign() for n, x in g.scales.items()})
    if only == "scales":
        return Element(one.perms, {n: x.abs() for n, x in g.scales.items()})
    return g


def deviation(kind, rule, *, only=None, steps=STEPS, lr=1.0, told=None, symmetry=None, model=None):
    """How far g^-1.(trained from g.theta) ends from (trained from theta), and how far that went from theta.

    ``told``: the symmetry that the optimizer believes in, if it is not the network's.
    """
    model = make_model(kind) if model is None else model
    symmetry = symmetry or infer(model)
    moved, start, g = copy.deepcopy(model), weights(model), element(symmetry, only)
    moved.load_state_dict(symmetry.act(g, start))
    losses, followed = (train(m, kind, rule, told or symmetry, steps, lr) for m in (model, moved))
    end, back = weights(model), symmetry.act(symmetry.invert(g), weights(moved))
    assert all(x.isfinite().all() for x in end.values())
    error = distance(end, back, symmetry)
    if error < 1e-8:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(followed), rtol=1e-5, atol=1e-7)
    return error, distance(start, end, symmetry)


OURS = ["auto_lr", "whitened_polar"]


# ------------------------------------------------------------------------------------ what holds
@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_transformed_network_trains_transformed(kind, rule):
    error, way = deviation(kind, rule)
    assert way > 0.05, "hardly trained: nothing was tested"
    assert error < 1e-8


@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("kind", ["relu", "cnn", "transformer, q k v apart"])
def test_a_network_with_zero_biases_trains_transformed(kind, rule):
    model = make_model(kind)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.zero_()
    assert deviation(kind, rule, steps=10, model=model)[0] < 1e-8


def test_nothing_of_the_group_was_missing():
    """The group elements of these tests reach what they are meant to reach."""
    kinds = {k: {s.kind for s in infer(make_model(k)).scales.values()} for k in MODELS}
    assert kinds["relu"] == kinds["cnn without norm"] == {"positive"}
    assert kinds["cnn"] == {"positive", "sign"}  # a norm undoes the sign of what it reads
    assert kinds["tanh"] == kinds["sin"] == {"sign"}
    assert kinds["transformer"] == {"real"} and kinds["transformer, q k v apart"] == {"real", "positive"}
    labels = infer(make_model("transformer")).labels
    assert len(labels) == 5  # the stream; heads, what q and k and what v and proj share within them; hidden units
    scale = torch.cat([x.flatten() for x in element(infer(make_model("relu"))).scales.values()])
    assert scale.min() < 0.1 and scale.max() > 10


@settings(max_examples=8, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    activation=st.sampled_from(("relu", "leaky", "tanh", "sin", "gelu")),
    rule=st.sampled_from(OURS),
    seed=st.integers(0, 1000),
)
def test_any_mlp_trains_transformed(widths, activation, rule, seed):
    torch.manual_seed(seed)
    model = mlp([5, *widths, 3], activation).double()
    assert deviation("relu", rule, steps=4, model=model)[0] < 1e-8


# ----------------------------------------------------------------------------- what does not hold
def test_adam_follows_permutations_and_signs_but_not_scale():
    run = partial(deviation, rule=Adam(), lr=1e-2)
    assert run("relu", only="permutations")[0] < 1e-8
    assert run("tanh")[0] < 1e-8
    assert run("relu", only="scales")[0] > 1e-2


def test_told_of_no_symmetry_scale_is_not_followed_and_permutations_are():
    symmetry = independent(weights(make_model("relu")))
    run = partial(deviation, "relu", "whitened_polar", told=symmetry)
    assert run(only="scales")[0] > 1e-2
    assert run(only="permutations")[0] < 1e-8


def relabelled(symmetry, name, axis, leaf, scales=None):
    """The symmetry with another leaf on one axis."""
    spec = symmetry.specs[name]
    axes = tuple(leaf if i == axis else a for i, a in enumerate(spec.axes))
    return Symmetry(
        {**symmetry.specs, name: Spec(axes, spec.roles)}, symmetry.labels, {**symmetry.scales, **(scales or {})}
    )


def test_a_reader_with_a_scale_of_its_own_breaks_it():
    symmetry = infer(make_model("relu"))
    leaf = symmetry.specs["2.weight"].axes[1]
    wrong = relabelled(
        symmetry, "2.weight", 1, replace(leaf, scale=(("own", -1),)), {"own": Scale("positive", leaf.size, leaf.label)}
    )
    for rule in OURS:
        assert deviation("relu", rule, told=wrong, symmetry=symmetry)[0] > 1e-2


class Seeing(WhitenedPolar):
    """Steps that tell units apart by their number."""

    def forward(self, params, grads, *args, **kwargs):
        grads = {n: g * torch.arange(1, len(g) + 1).view(-1, *[1] * (g.ndim - 1)) for n, g in grads.items()}
        return super().forward(params, grads, *args, **kwargs)


def test_a_rule_that_tells_units_apart_breaks_it():
    assert deviation("tanh", Seeing(), only="permutations")[0] > 1e-2


def test_a_coupling_that_the_network_lacks_changes_nothing():
    """Two hidden layers of one width, taken for the same units: no number goes from one to the other."""
    torch.manual_seed(0)
    model = mlp([5, 6, 6, 3], "tanh").double()
    symmetry = infer(model)
    wrong = symmetry
    for name, axis in (("2.weight", 0), ("2.bias", 0), ("4.weight", 1)):
        wrong = relabelled(wrong, name, axis, Leaf(6, symmetry.specs["0.bias"].axes[0].label))
    assert deviation("tanh", "auto_lr", told=wrong, symmetry=symmetry, model=model)[0] < 1e-8


# --------------------------------------------------------------------------- the scale of the loss
@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("kind", ["relu", "cnn", "transformer"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_the_loss_changes_nothing(kind, rule, factor):
    for dtype, bound in ((torch.float64, 1e-5), (torch.float32, 5e-2)):  # a network magnifies rounding
        plain, scaled = make_model(kind, dtype), make_model(kind, dtype)
        symmetry = infer(plain)
        train(plain, kind, rule, symmetry, steps=10)
        train(scaled, kind, rule, symmetry, steps=10, factor=factor)
        assert distance(weights(plain), weights(scaled), symmetry) < bound


@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("kind", ["relu", "cnn", "transformer"])
def test_a_tensor_without_signal_does_not_move(kind, rule):
    model = make_model(kind)
    names = [n for n, _ in model.named_parameters()]
    for silent in names:
        model = make_model(kind)
        optimizer = NFNOpt(model.named_parameters(), symmetry=infer(model), rule=make_rule(rule), total_steps=9)
        before = weights(model)
        for step in range(2):
            x, y = minibatch(kind, step)
            optimizer.zero_grad()
            cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            model.get_parameter(silent).grad.zero_()
            optimizer.step()
        stayed = {n for n, p in weights(model).items() if torch.equal(p, before[n])}
        assert stayed == {silent}


def test_a_tensor_that_only_rounding_moves_stays():
    """Softmax cannot see a key's bias: its gradient is rounding noise, which must not become steps."""
    model = make_model("transformer, q k v apart")
    start = weights(model)
    train(model, "transformer", "auto_lr", infer(model), steps=10)
    noise: Tensor = model.blocks[0].attn.k.bias.grad
    assert noise.abs().max() < 1e-14
    stayed = {n for n, p in weights(model).items() if torch.equal(p, start[n])}
    assert stayed == {"blocks.0.attn.k.bias"}
