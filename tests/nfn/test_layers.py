"""NP, HNP and monomial layers: what they commute with, what they do not, and the formulas they stand for."""

import pytest
import torch
from torch import nn

from learned_opt import SymmetryError
from learned_opt.nfn import (
    Chain,
    ChannelDropout,
    FourierFeatures,
    GradientGate,
    HNPLinear,
    IOSinusoidal,
    LearnedScale,
    MAGEPLinear,
    MonomialLinear,
    MonomialPool,
    MonomialSignLinear,
    NPLinear,
    features_of,
    pointwise,
    split_channels,
    stack,
    unstack,
)
from learned_opt.symmetry import Label, Spec, Symmetry
from learned_opt.symmetry.axes import Leaf
from tests.inferred import infer
from tests.nfn.chains import NETWORKS, act, broken, chain_of, error, mlp, network, random_features, zoo_cnn

every_network = pytest.mark.parametrize("kind", NETWORKS)
EXACT = 1e-12


# ------------------------------------------------------------------------------------------- equivariance
@every_network
@pytest.mark.parametrize("make", [NPLinear, HNPLinear])
def test_permutation_layers_keep_permutations_only(kind, make):
    chain, symmetry = network(kind, None)
    layer, features = make(chain, 2, 3).double(), random_features(chain)
    assert broken(layer, symmetry, features) < EXACT
    for scale in ("positive", "sign"):
        _, larger = network(kind, scale)
        assert broken(layer, larger, features) > 1e-2


@every_network
def test_np_keeps_permutations_of_inputs_and_outputs_unless_they_are_embedded(kind):
    chain, _ = network(kind, None)
    inputs, outputs = torch.arange(chain.n_in).roll(1), torch.arange(chain.n_out).roll(1)

    def move(features):
        first, last = chain.layers[0], chain.layers[-1]
        moved = features | {first.weight: features[first.weight][:, :, :, inputs]}
        moved[last.weight] = moved[last.weight][:, :, outputs]
        return moved | ({last.bias: features[last.bias][:, :, outputs]} if last.bias else {})

    features = random_features(chain)
    layer = NPLinear(chain, 2, 3).double()
    assert error(layer(move(features)), move(layer(features))) < EXACT
    for other in (NPLinear(chain, 2, 3, io_embed=True).double(), HNPLinear(chain, 2, 3).double()):
        assert error(other(move(features)), move(other(features))) > 1e-2


@every_network
@pytest.mark.parametrize("scale", [None, "positive", "sign", "sine"])
def test_monomial_linear_keeps_every_scale(kind, scale):
    chain, symmetry = network(kind, scale)
    assert broken(MonomialLinear(chain, 2, 3).double(), symmetry, random_features(chain)) < EXACT


@every_network
def test_sign_layer_keeps_signs_and_not_positive_scales(kind):
    chain, symmetry = network(kind, "sign")
    layer, features = MonomialSignLinear(chain, 2, 3).double(), random_features(chain)
    assert broken(layer, symmetry, features) < EXACT
    relu, positive = network(kind, "positive")
    if kind != "no bias":  # with neither bias nor a second layer there are no more maps
        assert broken(layer, positive, features) > 1e-2
    with pytest.raises(SymmetryError, match="MonomialLinear"):
        MonomialSignLinear(relu, 2, 3)


@pytest.mark.parametrize("kind", ["mlp", "one hidden layer", "cnn"])
def test_sign_layer_has_more_maps_than_the_monomial_layer(kind):
    chain, _ = network(kind, "sign")
    more, less = MonomialSignLinear(chain, 1, 1), MonomialLinear(chain, 1, 1)
    count = sum(p.numel() for p in more.parameters()) - sum(p.numel() for p in less.parameters())
    last, n_in = chain.layers[-1], chain.n_in
    writers = 1 + (n_in * chain.layers[0].filters if chain.depth == 2 else 0)
    assert count == 2 * chain.n_out * last.filters * writers


# ------------------------------------------------------------------------------------ the formulas, slowly
def folded(chain, features):
    """Weights as ``[B, C f, n_out, n_in]`` with channels in the order (c, h, w), and biases."""
    weights = []
    for layer in chain.layers:
        x = features[layer.weight]
        x = x.unflatten(3, (layer.n_in, layer.filters)) if layer.flat else x
        x = x.flatten(4) if x.ndim > 4 else x.unsqueeze(-1)
        b, c, o, i, f = x.shape
        weights.append(torch.stack([x[:, ch, :, :, k] for ch in range(c) for k in range(f)], 1))
    return weights, [features[layer.bias] for layer in chain.layers]


@pytest.mark.parametrize("kind", ["mlp", "deep mlp", "one hidden layer", "cnn", "cnn, flattened"])
def test_monomial_linear_is_its_formula(kind):
    chain, _ = network(kind, "sign")
    n, m, end = 2, 3, chain.depth - 1
    layer, features = MonomialSignLinear(chain, n, m).double(), random_features(chain, n)
    weights, biases = folded(chain, features)
    found_w, found_b = folded(chain, layer(features))
    maps = layer.weights.maps
    f = [x.filters for x in chain.layers]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        a, z = [maps[f"{what}{i}"].matrices for what in ("weight", "bias")]
        if i == 0:
            q = chain.n_in
            y = torch.einsum("mknq,bnjq->bmjk", a[0].reshape(m * f[0], q, n * f[0], q), w)
            y += torch.einsum("mkn,bnj->bmjk", a[1].reshape(m * f[0], q, n), b)
            v = torch.einsum("mnq,bnjq->bmj", z[0].reshape(m, n * f[0], q), w) + torch.einsum("mn,bnj->bmj", z[1], b)
            if end == 1:
                p = chain.n_out
                y += torch.einsum("mknp,bnpj->bmjk", a[2].reshape(m * f[0], q, n * f[1], p), weights[1])
                v += torch.einsum("mnp,bnpj->bmj", z[2].reshape(m, n * f[1], p), weights[1])
        elif i < end:
            y, v = torch.einsum("mn,bnjk->bmjk", a[0], w), torch.einsum("mn,bnj->bmj", z[0], b)
            if i == end - 1:
                c = z[1].reshape(m, n * f[end], chain.n_out)
                v += torch.einsum("mnp,bnpj->bmj", c, weights[end])
        else:
            p = chain.n_out
            y = torch.einsum("mjnp,bnpk->bmjk", a[0].reshape(m * f[i], p, n * f[i], p), w)
            own = a[1:]
            if end == 1:
                q = chain.n_in
                y += torch.einsum("mjnq,bnkq->bmjk", own[0].reshape(m * f[1], p, n * f[0], q), weights[0])
                own = own[1:]
            y += torch.einsum("mjn,bnk->bmjk", own[0].reshape(m * f[i], p, n), biases[end - 1])
            v = torch.einsum("mjnp,bnp->bmj", z[0].reshape(m, p, n, p), b) + maps[f"bias{i}"].constant.reshape(m, p)
        torch.testing.assert_close(found_w[i], y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found_b[i], v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "one hidden layer"])
def test_np_linear_is_its_formula(kind):
    chain, _ = network(kind, None)
    layer, features = NPLinear(chain, 2, 3).double(), random_features(chain)
    weights, biases = folded(chain, features)
    found_w, found_b = folded(chain, layer(features))

    def apply(mix, x):  # [B, rows, ...]
        return torch.einsum("mn,bn...->bm...", mix.matrices[0], x) + mix.constant.reshape(-1, *[1] * (x.ndim - 2))

    r = torch.cat([w.mean((2, 3)) for w in weights] + [b.mean(2) for b in biases], 1)
    for i, (w, b, one) in enumerate(zip(weights, biases, layer.layers, strict=True)):
        read = [w.mean(2)] + ([weights[i - 1].mean(3), biases[i - 1]] if i else [])
        written = [w.mean(3), b] + [x.mean(2) for x in weights[i + 1 : i + 2]]
        read, written = torch.cat(read, 1), torch.cat(written, 1)
        y = apply(one.own, w) + apply(one.network, r)[..., None, None]
        y = y + apply(one.read, read)[:, :, None, :] + apply(one.written, written)[..., None]
        v = apply(one.bias.unit, written) + apply(one.bias.network, r)[..., None]
        torch.testing.assert_close(found_w[i], y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found_b[i], v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "deep mlp", "cnn", "one hidden layer"])
def test_hnp_linear_is_its_formula(kind):
    chain, _ = network(kind, None)
    m, end = 3, chain.depth - 1
    layer, features = HNPLinear(chain, 2, m).double(), random_features(chain)
    weights, biases = folded(chain, features)
    found_w, found_b = folded(chain, layer(features))

    def unit(part, x, r):
        return linear(part.unit, x) + linear(part.network, r)[..., None]

    def linear(mix, x):
        return torch.einsum("mn,bn...->bm...", mix.matrices[0], x) + mix.constant.reshape(-1, *[1] * (x.ndim - 2))

    rm, cm = [w.mean(2) for w in weights], [w.mean(3) for w in weights]
    rows_first = weights[0].transpose(2, 3).flatten(1, 2)  # (c q) j
    cols_last = weights[-1].flatten(1, 2)  # (c p) k
    parts = [w.mean((2, 3)) for w in weights] + [b.mean(2) for b in biases]
    r = torch.cat(parts + [rm[0].flatten(1), cm[-1].flatten(1), biases[-1].flatten(1)], 1)
    x = torch.cat([rows_first, rm[1], biases[0]] + ([cols_last] if end == 1 else []), 1)
    torch.testing.assert_close(found_w[0], unit(layer.first, x, r).unflatten(1, (-1, chain.n_in)).transpose(2, 3))
    torch.testing.assert_close(found_b[0], unit(layer.first_bias, x, r))
    for i, one in enumerate(layer.hidden, 1):
        read = torch.cat([rm[i], cm[i - 1], biases[i - 1]] + ([rows_first] if i == 1 else []), 1)
        written = torch.cat([cm[i], biases[i], rm[i + 1]] + ([cols_last] if i == end - 1 else []), 1)
        y = linear(one.own, weights[i]) + linear(one.network, r)[..., None, None]
        y = y + linear(one.read, read)[:, :, None, :] + linear(one.written, written)[..., None]
        torch.testing.assert_close(found_w[i], y)
        torch.testing.assert_close(found_b[i], unit(one.bias, written, r))
    x = torch.cat([cols_last, cm[-2]] + ([rows_first] if end == 1 else []), 1)
    torch.testing.assert_close(found_w[end], unit(layer.last, x, r).unflatten(1, (-1, chain.n_out)))
    torch.testing.assert_close(found_b[end], linear(layer.last_bias, r).unflatten(1, (-1, chain.n_out)))


# --------------------------------------------------------------------------------------- what backward keeps
@pytest.mark.parametrize("make", [MonomialLinear, MonomialSignLinear])
def test_monomial_layers_keep_only_their_inputs_for_backward(make):
    chain = chain_of(zoo_cnn(nn.Tanh, 4, 3))
    first, second = make(chain, 1, 5), make(chain, 5, 5)
    with torch.no_grad():
        features = first(random_features(chain, 1, dtype=torch.float32))  # in the layout that layers write
    known = {x.untyped_storage().data_ptr() for x in (*features.values(), *second.parameters())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        second(features)
    new = [x for x in kept if x.untyped_storage().data_ptr() not in known]
    assert kept and not new


# ---------------------------------------------------------------------------------------- nonlinearities
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "identity", "tanh", "sin", "square"])
@pytest.mark.parametrize("scale", ["positive", "sign"])
def test_nonlinearities_are_refused_where_they_break_the_group(name, scale):
    chain, symmetry = network("mlp", scale)
    breaks = broken(pointwise(name, None), symmetry, random_features(chain))
    if breaks < EXACT:
        pointwise(name, scale)
    else:
        assert breaks > 1e-3
        with pytest.raises(SymmetryError, match=scale):
            pointwise(name, scale)


def test_unknown_nonlinearity():
    with pytest.raises(SymmetryError, match="unknown"):
        pointwise("gelu", None)


# --------------------------------------------------------------------------------------------- encodings
@every_network
def test_encodings_keep_permutations(kind):
    chain, symmetry = network(kind, None)
    features = random_features(chain)
    for encoder in (FourierFeatures(2, 4, 1.0).double(), IOSinusoidal(chain), LearnedScale(chain).double()):
        assert broken(encoder, symmetry, features) < EXACT
    fourier = FourierFeatures(2, 4, 1.0).double()
    assert broken(fourier, network(kind, "sign")[1], features) > 1e-2
    assert {x.shape[1] for x in IOSinusoidal(chain)(features).values()} == {2 + 13}
    assert {x.shape[1] for x in fourier(features).values()} == {8}


def test_codes_tell_inputs_and_outputs_apart():
    chain, _ = network("mlp", None)
    code = IOSinusoidal(chain)(random_features(chain, 1))["0.weight"][0, 1:]
    assert not torch.equal(code[:, :, 0], code[:, :, 1])
    assert torch.equal(code[:, 0], code[:, 1])


def test_channel_dropout_drops_whole_channels():
    x = {"w": torch.ones(50, 4, 3, 2)}
    dropped = ChannelDropout(0.5)(x)["w"]
    assert {float(v) for v in dropped.unique()} == {0.0, 2.0}
    assert torch.equal(dropped.amax((2, 3)), dropped.amin((2, 3)))
    assert torch.equal(ChannelDropout(0.5).eval()(x)["w"], x["w"])


# ---------------------------------------------------------------------------------------------- gradients
def weights_and_gradients(model, weights, x, y):
    weights = {n: w.detach().requires_grad_() for n, w in weights.items()}
    loss = (torch.func.functional_call(model, weights, (x,)) - y).square().mean()
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def problem(scale):
    act_of = {"positive": nn.ReLU, "sign": nn.Tanh}[scale]
    model = mlp([3, 6, 5, 2], act_of).double()
    params = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    return model, params, lambda w: weights_and_gradients(model, w, x, y)


@pytest.mark.parametrize("scale", ["positive", "sign"])
def test_gradients_transform_contragrediently(scale):
    model, params, gradient = problem(scale)
    symmetry = infer(model)
    g = symmetry.sample()
    moved = gradient(symmetry.act(g, params))
    assert error(moved, symmetry.act(g, gradient(params), dual=True)) < EXACT
    like_weights = error(moved, symmetry.act(g, gradient(params)))
    assert like_weights < EXACT if scale == "sign" else like_weights > 1e-2


def test_gradients_of_a_relu_unit_balance():
    _, w, gradient = problem("positive")
    g = gradient(w)
    into = (w["0.weight"] * g["0.weight"]).sum(1) + w["0.bias"] * g["0.bias"]
    torch.testing.assert_close(into, (w["2.weight"] * g["2.weight"]).sum(0))


@pytest.mark.parametrize("make", [MonomialLinear, MAGEPLinear])
def test_layers_take_real_gradients_with_the_flag_and_not_without(make):
    model, params, gradient = problem("positive")
    symmetry = infer(model)
    chain = Chain.from_symmetry(symmetry)
    g = symmetry.sample()

    def features(w):
        return stack(features_of([w]), features_of([gradient(w)]))

    def broken_by(layer, duals):
        before, after = layer(features(params)), layer(features(symmetry.act(g, params)))
        n = next(iter(before.values())).shape[1] - duals
        weights, rest = split_channels(before, n)
        wanted = act(symmetry, g, weights)
        return error(after, stack(wanted, act(symmetry, g, rest, dual=True)) if duals else wanted)

    assert broken_by(make(chain, 1, 2, gradients=1).double(), 1) < 1e-11
    assert broken_by(make(chain, 2, 2).double(), 0) > 1e-2


@every_network
def test_gradient_streams_keep_the_group(kind):
    chain, symmetry = network(kind, "positive")
    w, g = random_features(chain, 2), random_features(chain, 3)
    element = symmetry.sample()
    moved = stack(act(symmetry, element, w), act(symmetry, element, g, dual=True))
    for layer in (MonomialLinear(chain, 2, 4, gradients=3), GradientGate(chain, 2, 3)):
        layer = layer.double()
        x, y = split_channels(layer(stack(w, g)), 4 if isinstance(layer, MonomialLinear) else 2)
        wanted = stack(act(symmetry, element, x), act(symmetry, element, y, dual=True))
        assert error(layer(moved), wanted) < EXACT
        other = stack(act(symmetry, element, w), act(symmetry, element, g))
        assert error(layer(other), layer(stack(w, g))) > 1e-2
    pool = MonomialPool(chain, 2, gradients=3).double()
    assert error(pool(moved), pool(stack(w, g))) < EXACT


def test_streams_of_weights_and_gradients_do_meet():
    chain, _ = network("mlp", "positive")
    w, g = random_features(chain, 1), random_features(chain, 1)
    for layer in (MonomialLinear(chain, 1, 1, gradients=1), GradientGate(chain, 1, 1)):
        layer = layer.double()
        changed = layer(stack(w, {n: 2 * x for n, x in g.items()}))
        assert any(not torch.equal(changed[n][:, :1], x[:, :1]) for n, x in layer(stack(w, g)).items())


# ------------------------------------------------------------------------------------- chains and features
@every_network
def test_chain_from_state_dict_equals_the_one_from_the_symmetry(kind):
    model = NETWORKS[kind](nn.ReLU)
    chain = chain_of(model)
    assert Chain.from_state_dict(model.state_dict(), "positive") == chain
    chain.validate(features_of([model.state_dict()]), 1)


@pytest.mark.parametrize(("act_of", "scale"), [(nn.ReLU, "positive"), (nn.Tanh, "sign"), (nn.GELU, None)])
def test_chain_knows_its_scale(act_of, scale):
    assert chain_of(mlp([2, 3, 4, 2], act_of)).scale == scale


def test_networks_that_are_no_chain_are_refused():
    norm = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2))
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    for model in (norm, grouped, nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(SymmetryError):
            chain_of(model)
    with pytest.raises(SymmetryError, match="general"):
        chain_of(norm)
    with pytest.raises(SymmetryError, match="chain"):
        Chain.from_state_dict({"a": torch.zeros(3, 2), "b": torch.zeros(4, 5)})


def test_a_stream_read_twice_is_refused():
    def spec(out, inp):
        return Spec((out, inp), ("out", "in"))

    stream = Leaf(3, "stream")
    specs = {"a": spec(stream, Leaf(2)), "b": spec(stream, stream), "c": spec(Leaf(2), stream)}
    with pytest.raises(SymmetryError, match="stream.*read by"):
        Chain.from_symmetry(Symmetry(specs, {"stream": Label(3)}))


def test_features_and_back():
    states = [mlp([2, 3, 2]).state_dict() for _ in range(3)]
    features = features_of(states)
    assert {x.shape[:2] for x in features.values()} == {(3, 1)}
    for state, back in zip(states, unstack(stack(features, features), 1), strict=True):
        assert all(torch.equal(state[n], back[n]) for n in state)


def test_bad_features_are_explained():
    states = [mlp([2, 3, 2]).state_dict(), mlp([2, 4, 2]).state_dict()]
    with pytest.raises(ValueError, match="network 1.*0.bias"):
        features_of(states)
    with pytest.raises(ValueError, match="at least one"):
        features_of([])
    chain = chain_of(mlp([2, 3, 2]))
    layer = MonomialLinear(chain, 1, 1)
    with pytest.raises(SymmetryError, match="no features of 0.weight"):
        layer({})
    with pytest.raises(SymmetryError, match="expected"):
        layer(features_of(states[1:]))
    with pytest.raises(SymmetryError, match="1 channels, the layer reads 2"):
        MonomialLinear(chain, 2, 1)(features_of(states[:1]))
