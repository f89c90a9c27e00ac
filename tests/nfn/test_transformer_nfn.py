"""Transformer-NFN: its group is a transformer's, its layers follow it, and its sizes are the published ones."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from learned_opt import SymmetryError
from learned_opt.nfn.transformer import TransformerInvariant, TransformerLinear, TransformerNFN, TransformerReLU
from learned_opt.nfn.transformer_space import (
    TransformerElement,
    TransformerFeatures,
    TransformerSpec,
    concatenate,
    task_spec,
    zoo_spec,
)
from tasks.transformer import Transformer

DIM, HEADS, HIDDEN, CLASSES, BATCH = 6, 3, 5, 4, 2


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values, self.out_projection = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out_projection((scores @ v).transpose(1, 2).flatten(-2))


class Encoder(nn.Module):
    def __init__(self, dim, heads, hidden, residual):
        super().__init__()
        self.attention, self.residual = Attention(dim, heads), residual
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.residual * x + self.attention(self.norm(x))
        return self.residual * x + self.fc2(self.fc1(self.norm(x)).relu())


class ZooNet(nn.Module):
    """The form and the names of the Small Transformer Zoo's image networks."""

    def __init__(self, dim=DIM, heads=HEADS, hidden=HIDDEN, classes=CLASSES, patch=2, depth=2, residual=False):
        super().__init__()
        self.embedding = nn.ModuleDict({"conv1": nn.Conv2d(1, dim, patch, patch)})
        self.encoder = nn.ModuleList(Encoder(dim, heads, hidden, residual) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.classifier = nn.ModuleDict({"fc1": nn.Linear(dim, dim), "fc2": nn.Linear(dim, classes)})

    def forward(self, x):
        x = self.embedding["conv1"](x).flatten(2).transpose(1, 2)
        for block in self.encoder:
            x = block(x)
        x = self.norm(x).mean(1)
        return self.classifier["fc2"](self.classifier["fc1"](x).relu())


def zoo_net(**settings):
    torch.manual_seed(1)
    return ZooNet(**settings).double()


def task_net(fused):
    torch.manual_seed(1)
    model = Transformer(
        nn.Linear(4, DIM), 5, 3, width=DIM, heads=HEADS, depth=2, hidden=HIDDEN, causal=False, fused=fused
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


NETS = {
    "block": (zoo_net, lambda s: zoo_spec(s, HEADS)),
    "fixed": (lambda: zoo_net(residual=True), lambda s: zoo_spec(s, HEADS, "fixed")),
    "shared": (lambda: zoo_net(residual=True), lambda s: zoo_spec(s, HEADS, "shared")),
    "task, fused": (lambda: task_net(True), lambda s: task_spec(s, HEADS)),
    "task": (lambda: task_net(False), lambda s: task_spec(s, HEADS)),
}
every_net = pytest.mark.parametrize("kind", NETS)


def make(kind, **settings):
    """Model, spec and features of two networks: the model and one at random."""
    build, spec_of = NETS[kind]
    model = build(**settings)
    state = {n: p.detach() for n, p in model.named_parameters()}
    spec = spec_of(state)
    features = {n: torch.stack([x, torch.randn_like(x)]).unsqueeze(1) for n, x in state.items()}
    return model, spec, spec.pack(features)


def element(spec, seed=2):
    return spec.sample(torch.Generator().manual_seed(seed), condition=500)


def function(model, spec, features, which=0):
    state = {n: x[which, 0] for n, x in spec.unpack(features).items()}
    shape = (3, 1, 6, 6) if isinstance(model, ZooNet) else (3, 5, 4)
    return functional_call(model, state, (torch.randn(shape, generator=torch.Generator().manual_seed(0)).double(),))


def distance(a, b):
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in b)


def randomised(module, seed=3):
    """Biases start at zero: an error in them would not be seen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return module.double()


# --------------------------------------------------------------------------------------- the group
@every_net
def test_packing_loses_nothing(kind):
    model, spec, features = make(kind)
    state = {n: x[0, 0] for n, x in spec.unpack(features).items()}
    assert state.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(state[n], p) for n, p in model.named_parameters())


@every_net
def test_the_group_is_a_symmetry_of_the_network(kind):
    model, spec, features = make(kind)
    left = function(model, spec, spec.act(element(spec), features))
    right = function(model, spec, features)
    assert ((left - right).abs().max() / right.abs().max()).item() < 1e-10


def test_a_residual_network_does_not_have_the_stream_of_each_block():
    model, spec, features = make("block")
    residual = zoo_net(residual=True)
    moved = spec.act(element(spec), features)
    assert (function(residual, spec, moved) - function(residual, spec, features)).abs().max() > 1e-2


def without_inverse(spec, g, features):
    """M on the queries, and on the keys too."""
    other = TransformerElement(g.heads, torch.linalg.inv(g.qk).mT, g.vo, g.hidden, g.stream, g.classifier)
    moved, keys = spec.act(g, features), spec.act(other, features).blocks["k"]
    return TransformerFeatures({**moved.blocks, "k": keys}, moved.rest)


def test_without_the_inverse_on_the_keys_nothing_holds():
    model, spec, features = make("block")
    g = element(spec)
    wrong = without_inverse(spec, g, features)
    assert (function(model, spec, wrong) - function(model, spec, features)).abs().max() > 1e-3
    layer = randomised(TransformerLinear(spec, 1, 2))
    right = spec.act(g, layer(features)).blocks
    assert distance(layer(wrong).blocks, right) > 1e-3
    invariant = randomised(TransformerInvariant(spec, 1, 3))
    assert (invariant(wrong) - invariant(features)).abs().max() > 1e-3


# -------------------------------------------------------------------------------------- the layers
@every_net
def test_the_equivariant_layers_follow_the_group(kind):
    _, spec, features = make(kind)
    g = element(spec)
    stack = randomised(nn.Sequential(TransformerLinear(spec, 1, 2), TransformerReLU(), TransformerLinear(spec, 2, 3)))
    left, right = stack(spec.act(g, features)), spec.act(g, stack(features))
    assert distance(left.blocks, right.blocks) < 1e-10
    assert distance(left.rest, right.rest) < 1e-10


@pytest.mark.parametrize("classifier", ["invariant", "none"])
@every_net
def test_the_model_is_invariant(kind, classifier):
    _, spec, features = make(kind)
    model = randomised(TransformerNFN(spec, channels=(2, 3), classifier=classifier, outputs=2, sigmoid=False))
    assert (model(spec.act(element(spec), features)) - model(features)).abs().max() < 1e-10
    assert model(features).shape == (BATCH, 2)
    assert (model(features)[0] - model(features)[1]).abs().max() > 1e-3


def test_the_papers_classifier_head_sees_its_own_units_order_and_only_that():
    _, spec, features = make("block")
    model, g = randomised(TransformerNFN(spec, channels=(2,), sigmoid=False)), element(spec)
    still = torch.arange(len(g.classifier))
    inner = TransformerElement(g.heads, g.qk, g.vo, g.hidden, g.stream, still)
    assert (model(spec.act(inner, features)) - model(features)).abs().max() < 1e-10
    assert (model(spec.act(g, features)) - model(features)).abs().max() > 1e-4


def test_a_layer_for_single_blocks_fails_under_another_stream():
    """A layer for a fixed stream does not follow permutations of it: the three kinds differ."""
    _, spec, features = make("block")
    layer = randomised(TransformerLinear(zoo_spec_of("fixed"), 1, 2))
    g = element(spec)
    assert distance(layer(spec.act(g, features)).blocks, spec.act(g, layer(features)).blocks) > 1e-3


def zoo_spec_of(stream):
    return zoo_spec(dict(zoo_net().named_parameters()), HEADS, stream)


def reference(layer, block, spec):
    """The paper's formulas as sums over indices, for one block and one channel in and out, term by term."""
    x = {n: t[0, 0] for n, t in block.items()}
    d = spec.dim
    qk, vo = torch.zeros(d, d).double(), torch.zeros(d, d).double()
    for h in range(spec.heads):
        for p in range(d):
            for q in range(d):
                qk[p, q] += sum(x["q"][h, p, i] * x["k"][h, q, i] for i in range(spec.d_k))
                vo[p, q] += sum(x["v"][h, p, i] * x["o"][h, i, q] for i in range(spec.d_v))
    wa, ba, wb, bb = x["a"], x["a_bias"], x["b"], x["b_bias"]
    dims = {"qk": qk, "vo": vo, "a": wa, "a_bias": ba, "b": wb, "b_bias": bb}
    sources = list(dims.values())
    axes = ["FG", "Fs", "su", "u", "uF", "F"]  # s, u: permuted; F, G: positional
    outs = {"a": "su", "a_bias": "u", "b": "uF", "b_bias": "F"}
    results, weights = {}, iter(layer.rest.weights)
    for (name, out), found in zip(outs.items(), layer.rest.terms, strict=True):
        total = torch.zeros_like(dims[name])
        for i, term in found:
            weight = next(weights).detach()
            weight = weight[0] if i is None else weight[0, 0]
            source = torch.ones(()) if i is None else sources[i]
            named = "" if i is None else axes[i]
            aligned = set(term.x) & set(term.y)
            for at in torch.cartesian_prod(*(torch.arange(n) for n in total.shape)).reshape(-1, total.ndim).tolist():
                here = dict(zip(term.y, at, strict=True))
                free = [k for k, c in enumerate(term.x) if c not in aligned]
                counts = [source.shape[k] for k in free if named[k] in "su"]
                value = 0.0
                grid = torch.cartesian_prod(*(torch.arange(source.shape[k]) for k in free)) if free else None
                for index in grid.reshape(-1, len(free)).tolist() if grid is not None else [[]]:
                    pick = dict(zip(free, index, strict=True))
                    position = [pick[k] if k in pick else here[term.x[k]] for k in range(len(term.x))]
                    theta = [p for p, n in zip(position, named, strict=True) if n in "FG"]
                    theta += [p for p, n in zip(at, out, strict=True) if n == "F"]
                    value = value + weight[tuple(theta)] * source[tuple(position)]
                total[tuple(at)] += value / math.prod(counts)
        results[name] = total
    return results


def test_the_fast_path_against_the_formulas():
    torch.manual_seed(5)
    spec = zoo_spec(dict(ZooNet(dim=3, heads=1, hidden=2, depth=1, classes=2).named_parameters()), 1)
    layer = randomised(TransformerLinear(spec, 1, 1)).blocks[0]
    shapes = {"q": (1, 3, 3), "k": (1, 3, 3), "v": (1, 3, 3), "o": (1, 3, 3)}
    shapes |= {n: tuple(d.size for d in dims) for n, dims in spec.feed_forward.items()}
    block = {n: torch.randn(1, 1, *s, dtype=torch.float64) for n, s in shapes.items()}
    fast = layer(block)
    for name, expected in reference(layer, block, spec).items():
        torch.testing.assert_close(fast[name][0, 0].detach(), expected)
    theta = layer.read["q"].map.weights[0][0, 0].detach()  # [input row, output row]
    torch.testing.assert_close(fast["q"][0, 0, 0].detach(), theta.T @ block["q"][0, 0, 0])
    same, mean = (w[0, 0].detach() for w in layer.write.map.weights)
    o = block["o"][0, 0, 0]
    torch.testing.assert_close(fast["o"][0, 0, 0].detach(), same * o + mean * o.mean(-1, keepdim=True))


# -------------------------------------------------------------------------------- published sizes
def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_published_numbers_of_parameters():
    with torch.device("meta"):
        net = ZooNet(32, 2, 64, 10, patch=4)
    spec = zoo_spec(dict(net.named_parameters()))
    assert sum(p.numel() for p in net.parameters()) == 18_506
    assert count(TransformerLinear(spec, 1, 10)) == 1_567_640
    assert count(TransformerInvariant(spec, 10, 10)) == 224_460
    assert count(TransformerNFN(spec)) == 1_812_181  # MNIST
    with torch.device("meta"):
        text = ZooNet(32, 2, 64, 4, patch=4)
    state = {n: p for n, p in text.named_parameters() if not n.startswith("embedding")}
    assert count(TransformerNFN(zoo_spec(state))) == 1_804_741  # AG News


# ---------------------------------------------------------------------------------------- gradients
def gradients(model, spec, features):
    """Of a loss that depends on the function alone, in the layout of the features."""
    state = {n: x[0, 0].clone().requires_grad_() for n, x in spec.unpack(features).items()}
    shape = (3, 1, 6, 6) if isinstance(model, ZooNet) else (3, 5, 4)
    y = functional_call(model, state, (torch.randn(shape, generator=torch.Generator().manual_seed(0)).double(),))
    values = torch.autograd.grad(y.square().sum(), list(state.values()))
    return {n: g[None, None] for n, g in zip(state, values, strict=True)}


@every_net
def test_gradients_transform_contragrediently(kind):
    model, spec, features = make(kind)
    first = TransformerFeatures(*({n: x[:1] for n, x in part.items()} for part in (features.blocks, features.rest)))
    g = element(spec)
    right = spec.act(g, spec.pack(gradients(model, spec, first)), dual=True)
    left = spec.pack(gradients(model, spec, spec.act(g, first)))
    assert distance(left.blocks, right.blocks) < 1e-9
    assert distance(left.blocks, spec.act(g, spec.pack(gradients(model, spec, first))).blocks) > 1e-2


@pytest.mark.parametrize("kind", ["fixed", "shared", "task, fused"])
def test_gradient_channels_are_followed(kind):
    model, spec, features = make(kind)
    first = TransformerFeatures(*({n: x[:1] for n, x in part.items()} for part in (features.blocks, features.rest)))
    g = element(spec)
    moved = spec.act(g, first)
    both, after = (spec.pack(spec.unpack(x), gradients(model, spec, x)) for x in (first, moved))
    layer = randomised(TransformerLinear(spec, 2, 2))
    assert distance(layer(after).blocks, spec.act(g, layer(both)).blocks) < 1e-9
    invariant = randomised(TransformerNFN(spec, in_channels=2, channels=(2,), classifier="invariant", sigmoid=False))
    assert (invariant(after) - invariant(both)).abs().max() < 1e-9
    as_weights = [concatenate(x, spec.pack(gradients(model, spec, x))) for x in (first, moved)]
    assert distance(layer(as_weights[1]).blocks, spec.act(g, layer(as_weights[0])).blocks) > 1e-2


def test_gradients_are_refused_where_each_block_permutes_its_stream():
    model, spec, features = make("block")
    state = spec.unpack(features)
    with pytest.raises(SymmetryError, match="stream='fixed' or 'shared'"):
        spec.pack(state, state)


# ------------------------------------------------------------------------------------ use and misuse
def test_every_parameter_is_trained():
    _, spec, features = make("block")
    model = randomised(TransformerNFN(spec, channels=(2, 2)))
    model(features).sum().backward()
    # the last layer's W_Q .. W_O and all before it are read through products
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(bool(p.grad.abs().max() > 0) for p in model.parameters()) > 0.9 * len(list(model.parameters()))


def test_what_does_not_fit_is_refused():
    _, spec, features = make("block")
    state = spec.unpack(features)
    with pytest.raises(SymmetryError, match="queries.weight is missing"):
        spec.pack({n: x for n, x in state.items() if "queries" not in n})
    with pytest.raises(SymmetryError, match="fc1.weight has shape"):
        spec.pack(state | {"encoder.1.fc1.weight": torch.zeros(1, 1, 2, 2)})
    with pytest.raises(SymmetryError, match="not of this format"):
        zoo_spec({"weight": torch.zeros(2, 2)})
    wrong: dict[str, Any] = {"stream": "none"}
    with pytest.raises(SymmetryError, match="choose block"):
        TransformerSpec(4, 2, 2, 2, 4, (), **wrong)
    with pytest.raises(ValueError, match="at least one"):
        TransformerNFN(spec, channels=())
