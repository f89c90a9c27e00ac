"""MAGEP layers: every stable term against plain products, its transformation law, and the layers built of them."""

import pytest
import torch
from torch import nn

from learned_opt import SymmetryError
from learned_opt.nfn import Chain, MAGEPInvariant, MAGEPLinear, MonomialLinear, pointwise
from learned_opt.nfn.magep import Terms, _psi
from learned_opt.nfn.monomial import read_rows
from tests.nfn.chains import act, error, network, plain, random_features

KINDS = ["mlp", "deep mlp", "one hidden layer"]
every_network = pytest.mark.parametrize("kind", KINDS)
every_scale = pytest.mark.parametrize("scale", [None, "positive", "sign"])
EXACT = 1e-12


def matrices(chain, features):
    """Weights ``[B, d, n_s, n_{s-1}]`` and biases ``[B, d, n_s]`` by position from 1."""
    w = {s: features[layer.weight] for s, layer in enumerate(chain.layers, 1)}
    return w, {s: features[layer.bias] for s, layer in enumerate(chain.layers, 1)}


class Slow:
    """The definitions, term by term, with every product formed."""

    def __init__(self, chain, features, psi):
        self.weights, self.biases = matrices(chain, features)
        self.end, self.psi = chain.depth, psi

    def w(self, s, t):
        product = self.weights[t + 1]
        for i in range(t + 2, s + 1):
            product = self.weights[i] @ product
        return product

    def right(self, t):  # [W]^(L,t), the identity for t = L
        return self.w(self.end, t)

    def wb(self, s, t):
        return torch.einsum("bdij,bdj->bdi", self.w(s, t), self.biases[t])

    def bw(self, s, t):
        row = torch.einsum("dp,bdpk->bdk", self.psi[s - 1][:, -1], self.right(t))
        return torch.einsum("bdj,bdk->bdjk", self.biases[s], row)

    def ww(self, s, t):
        return torch.einsum("bdjq,dqp,bdpk->bdjk", self.w(s, 0), self.psi[s - 1][:, :-1], self.right(t))


def transport(chain, g, symmetry, term, s, t):
    """``g^(s) X (g^(t))^{-1}`` computed by the action on a matrix between layers s and t (t = None: a vector)."""
    x = term
    for layer, axis, exponent in ((s, 2, 1), (t, 3, -1)):
        if layer is None or layer in (0, chain.depth):
            continue
        leaf = symmetry.specs[chain.layers[layer - 1].weight].axes[0]
        x = x.index_select(axis, g.perms[leaf.label])
        for name, _ in leaf.scale:
            shape = [1] * x.ndim
            shape[axis] = -1
            x = x * (g.scales[name] ** exponent).reshape(shape)
    return x


@every_network
@every_scale
def test_every_stable_term_moves_like_a_weight_between_its_layers(kind, scale):
    chain, symmetry = network(kind, scale)
    features, g, psi = random_features(chain), symmetry.sample(), _psi(chain, 2).double()
    before, after = Slow(chain, features, psi), Slow(chain, act(symmetry, g, features), psi)

    def holds(name, s, t, vector=False):
        wanted = transport(chain, g, symmetry, getattr(before, name)(s, t), s, None if vector else t)
        assert error(getattr(after, name)(s, t), wanted) < EXACT

    for s in range(1, chain.depth + 1):
        for t in range(s):
            for name in ("w", "bw", "ww"):
                holds(name, s, t)
            if t:
                holds("wb", s, t, vector=True)
        if s < chain.depth:
            for name in ("bw", "ww"):
                holds(name, s, s)
                trace = [torch.einsum("bdii->bd", getattr(x, name)(s, s)) for x in (before, after)]
                assert error(trace[1], trace[0]) < EXACT


def test_an_unstable_product_breaks_the_law():
    """Psi between hidden units leaves their factors uncancelled."""
    chain, symmetry = network("mlp", "positive")
    features, g = random_features(chain), symmetry.sample()
    psi = torch.randn(chain.widths[1], chain.widths[1], dtype=torch.float64)

    def between(f):
        w, _ = matrices(chain, f)
        return w[2] @ psi @ w[1]

    wanted = transport(chain, g, symmetry, between(features), 2, 0)
    assert error(between(act(symmetry, g, features)), wanted) > 1e-2


@every_network
def test_fast_terms_equal_the_definitions(kind):
    chain, _ = network(kind, None)
    features, psi = random_features(chain, 3), _psi(chain, 3).double()
    slow, fast, end = Slow(chain, features, psi), Terms(chain, read_rows(chain, features), psi), chain.depth

    def same(found, wanted):  # [d, B, ...] and [B, d, ...]
        torch.testing.assert_close(found.transpose(0, 1), wanted, rtol=1e-12, atol=1e-14)

    for s in range(1, end + 1):
        same(fast.left[s], slow.w(s, 0))
        same(fast.right[s - 1], slow.right(s - 1))
        same(fast.shifted[s], sum((slow.wb(s, t) for t in range(1, s)), torch.zeros_like(slow.biases[s])))
        for t in range(s):
            for found, wanted in zip(fast.pair(s, t), (slow.ww(s, t), slow.bw(s, t)), strict=True):
                same(found, wanted)
        if s < end:
            for found, name in zip(fast.traces(s), ("ww", "bw"), strict=True):
                same(found, torch.einsum("bdii->bd", getattr(slow, name)(s, s)))


def slow_invariants(slow, end):
    """The terms of the invariant layer as ``[B, rows]``, channels slowest, then p, then q."""
    outer = [x.flatten(1) for x in (slow.w(end, 0), slow.ww(end, 0), slow.bw(end, 0))]
    traces = [
        torch.stack([torch.einsum("bdii->bd", getattr(slow, name)(s, s)) for s in range(1, end)], -1).flatten(1)
        for name in ("ww", "bw")
    ]
    wb = sum((slow.wb(end, t) for t in range(1, end)), torch.zeros_like(slow.biases[end]))
    return [*outer, *traces, wb.flatten(1), slow.biases[end].flatten(1)]


@every_network
def test_layers_are_their_formulas(kind):
    chain, _ = network(kind, None)
    d, e, end = 2, 3, chain.depth
    layer, features = MAGEPLinear(chain, d, e).double(), random_features(chain, d)
    found_w, found_b = matrices(chain, layer(features))
    slow, maps = Slow(chain, features, layer.weights.psi), layer.weights.maps
    q, p = chain.n_in, chain.n_out
    for s in range(1, end + 1):
        a, z = maps[f"weight{s}"].matrices, maps[f"bias{s}"].matrices
        from_input = (slow.w(s, 0), slow.ww(s, 0), slow.bw(s, 0))
        between = (slow.weights[s], slow.ww(s, s - 1), slow.bw(s, s - 1))
        if s == 1:
            y = sum(
                torch.einsum("ekdq,bdjq->bejk", m.reshape(e, q, d, q), x) for m, x in zip(a, from_input, strict=False)
            )
            y = y + torch.einsum("ekd,bdj->bejk", a[3].reshape(e, q, d), slow.biases[1])
        elif s < end:
            y = sum(torch.einsum("ed,bdjk->bejk", m, x) for m, x in zip(a, between, strict=True))
        else:
            y = sum(torch.einsum("ejdp,bdpk->bejk", m.reshape(e, p, d, p), x) for m, x in zip(a, between, strict=True))
        if s < end:
            v = sum(torch.einsum("edq,bdjq->bej", m.reshape(e, d, q), x) for m, x in zip(z, from_input, strict=False))
            if s > 1:
                v = v + torch.einsum("ed,bdj->bej", z[3], sum(slow.wb(s, t) for t in range(1, s)))
            v = v + torch.einsum("ed,bdj->bej", z[-1], slow.biases[s])
        else:
            v = sum(torch.einsum("er,br->be", m, x) for m, x in zip(z, slow_invariants(slow, end), strict=True))
            v = (v + maps[f"bias{s}"].constant.squeeze(1)).unflatten(1, (e, p))
        torch.testing.assert_close(found_w[s], y, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found_b[s], v, rtol=1e-11, atol=1e-12)

    pool = MAGEPInvariant(chain, d, e).double()
    terms = slow_invariants(Slow(chain, features, pool.psi), end)
    wanted = sum(torch.einsum("er,br->be", m, x) for m, x in zip(pool.mix.matrices, terms, strict=True))
    torch.testing.assert_close(pool(features), wanted + pool.mix.constant.squeeze(1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "cnn"])
@every_scale
def test_layers_keep_all_three_groups(kind, scale):
    chain, symmetry = network(kind, scale)
    small, small_symmetry = plain(kind, scale)
    features = random_features(chain)
    enter = MonomialLinear(chain, 2, 3, to=chain.without_kernels()).double()
    names = dict(zip(chain.names, small.names, strict=True))
    rename = {v: k for k, v in names.items()}

    def inside(f):
        return {names[n]: x for n, x in enter(f).items()}

    layer, pool = MAGEPLinear(small, 3, 4).double(), MAGEPInvariant(small, 4, 5).double()
    leave = MonomialLinear(chain.without_kernels(), 4, 2, to=chain).double()
    g = symmetry.sample()
    before, after = layer(inside(features)), layer(inside(act(symmetry, g, features)))
    assert error(pool(after), pool(before)) < 1e-11
    back = [leave({rename[n]: x for n, x in f.items()}) for f in (before, after)]
    assert error(back[1], act(symmetry, g, back[0])) < 1e-11
    other = small_symmetry.sample()
    assert error(layer(act(small_symmetry, other, inside(features))), act(small_symmetry, other, before)) < 1e-11


def test_a_wrong_nonlinearity_is_noticed():
    """The negative control: absolute values of signs, tanh of positive scales."""
    for scale, name in (("positive", "tanh"), ("sign", "relu")):
        chain, symmetry = network("mlp", scale)
        layer, features, g = MAGEPLinear(chain, 2, 2).double(), random_features(chain), symmetry.sample()
        wrong = nn.Sequential(pointwise(name, None), layer)
        assert error(wrong(act(symmetry, g, features)), act(symmetry, g, wrong(features))) > 1e-2


def test_the_trace_forms_no_square():
    """Of [WW]^(s,s), n_s x n_s, only the trace is computed: no tensor that large is made."""
    chain = Chain.from_state_dict({"a": torch.zeros(500, 2), "a.b": torch.zeros(500), "b": torch.zeros(3, 500)})
    chain = Chain.from_state_dict({**{n: torch.zeros(s) for n, s in chain.shapes.items()}, "b.b": torch.zeros(3)})
    features = {n: torch.randn(1, 1, *s, requires_grad=True) for n, s in chain.shapes.items()}
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        MAGEPInvariant(chain, 1, 1)(features)
    assert max(sizes) <= (500 + 2) * 3


def test_kernels_and_missing_biases_are_refused():
    with pytest.raises(SymmetryError, match="without_kernels"):
        MAGEPLinear(network("cnn", None)[0], 1, 1)
    with pytest.raises(SymmetryError, match="bias"):
        MAGEPInvariant(network("no bias", None)[0], 1, 1)
