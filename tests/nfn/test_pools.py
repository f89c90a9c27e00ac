"""Pools: what they are invariant to, what they are not, and the frame of a chain."""

import pytest
import torch
from torch import nn

from learned_opt.nfn import (
    FlatWeights,
    GraphPool,
    HNPPool,
    Magnitude,
    MonomialPool,
    NPPool,
    StatNN,
    UnitPool,
)
from learned_opt.nfn.monomial import read_rows
from learned_opt.nfn.pools import in_frame
from tests.inferred import infer
from tests.nfn.chains import NETWORKS, act, broken, chain_of, error, network, random_features, zoo_cnn

every_network = pytest.mark.parametrize("kind", NETWORKS)
EXACT = 1e-12


@every_network
def test_pools_are_invariant_to_what_they_claim(kind):
    for scale in (None, "positive", "sign"):
        chain, symmetry = network(kind, scale)
        features = random_features(chain, 3)
        pool = MonomialPool(chain, 3).double()
        signs = broken(nn.Sequential(Magnitude(), pool), symmetry, features)
        assert signs < EXACT
        assert (broken(pool, symmetry, features) < EXACT) == (scale != "sign")
        for other in (NPPool(chain), HNPPool(chain), StatNN(chain)):
            assert (broken(other, symmetry, features) < EXACT) == (scale is None)
            assert other(features).shape == (2, 3 * other.outputs)
        assert pool(features).shape == (2, 3 * pool.outputs)


@every_network
def test_unit_pool_keeps_what_it_claims_and_nothing_less(kind):
    for scale in (None, "positive", "sign"):
        chain, symmetry = network(kind, scale)
        features, pool = random_features(chain, 3), UnitPool(chain, 3)
        g = symmetry.sample(scale_range=(1.0, 1e4))
        moved = act(symmetry, g, features)
        even = nn.Sequential(Magnitude(), pool)
        assert error(even(moved), even(features)) < EXACT
        assert (error(pool(moved), pool(features)) < EXACT) == (scale != "sign")
        assert pool(features).shape == (2, pool.outputs)
        # scales that no unit makes: one weight alone, or those of another network's symmetry
        name = chain.layers[1].weight
        assert error(pool(features | {name: 3 * features[name]}), pool(features)) > 1e-2
        if scale is None:
            _, larger = network(kind, "positive")
            assert error(pool(act(larger, larger.sample(), features)), pool(features)) > 1e-2


def test_unit_pool_sees_relative_magnitudes_that_directions_do_not():
    chain, _ = network("mlp", "positive")
    features = random_features(chain, 1)
    name = chain.layers[1].weight
    larger = features | {name: features[name].clone()}
    larger[name][..., 0, 0] *= 5.0
    directions, units = MonomialPool(chain, 1).double(), UnitPool(chain, 1)
    assert error(directions(larger), directions(features)) < EXACT
    assert error(units(larger), units(features)) > 1e-2


def test_unit_pool_is_its_formula():
    chain, _ = network("cnn", "positive")
    features = random_features(chain, 2)
    wanted = []
    for slot, rows in in_frame(chain, read_rows(chain, features)).items():
        for network_of_batch in rows.unbind(1):
            last = slot == ("bias", chain.depth - 1)
            root = [(r.square().sum() / r.numel() + 1e-6).sqrt() for r in network_of_batch]
            means = [r.sum() / r.numel() / s for r, s in zip(network_of_batch, root, strict=True)]
            wanted.append(network_of_batch if last else torch.stack([*means, *(s.log() for s in root)]))
    batch = len(features[chain.names[0]])
    by_network = [torch.cat(wanted[i::batch]) for i in range(batch)]
    torch.testing.assert_close(UnitPool(chain, 2)(features), torch.stack(by_network))


@every_network
def test_the_frame_is_the_network_with_its_units_at_scale_one(kind):
    chain, symmetry = network(kind, "positive")
    rows = read_rows(chain, random_features(chain, 3))
    framed = in_frame(chain, rows)
    for i in range(chain.depth - 1):
        w, b = framed["weight", i], framed.get(("bias", i), torch.zeros(()))
        into = w.square().sum(0 if i == 0 else (0, -1)) + b.square().sum(0 if b.ndim else ())
        torch.testing.assert_close(into, torch.ones_like(into))
    again = in_frame(chain, framed)
    assert max(error(again[slot], framed[slot]) for slot in framed) < EXACT
    unscaled, _ = network(kind, "sign")
    same = in_frame(unscaled, rows)
    assert all(same[slot] is rows[slot] for slot in rows)


def test_a_unit_that_nothing_writes_does_not_count():
    chain, _ = network("cnn", "positive")
    features = random_features(chain, 2)
    first, second = chain.layers[:2]
    for name in (first.weight, first.bias):
        features[name][:, :, 1] = 0
    other = features | {second.weight: features[second.weight].clone()}
    other[second.weight][:, :, :, 1] *= 7.0  # what reads it
    pool = UnitPool(chain, 2)
    assert torch.equal(pool(other), pool(features))
    features = {n: x.requires_grad_() for n, x in features.items()}
    gradients = torch.autograd.grad(pool(features).sum(), list(features.values()))
    assert all(x.isfinite().all() for x in gradients)


def test_monomial_pools_survive_scales_up_to_ten_thousand_in_single_precision():
    model = zoo_cnn()
    chain, symmetry = chain_of(model), infer(model)
    features = random_features(chain, 5, dtype=torch.float32)
    g = symmetry.sample(scale_range=(1.0, 1e4))
    for pool in (MonomialPool(chain, 5), UnitPool(chain, 5)):
        assert error(pool(act(symmetry, g, features)), pool(features)) < 1e-4


def test_pool_sizes_of_the_zoo_cnn():
    chain = chain_of(zoo_cnn())
    assert HNPPool(chain).outputs == 50
    assert UnitPool(chain, 5).outputs == 5 * (2 * (9 + 1 + 9 + 1 + 9 + 1 + 10) + 10)
    assert StatNN(chain).outputs == 56
    assert FlatWeights(chain).outputs == 4970


def test_flat_weights_and_back():
    chain, _ = network("cnn", "positive")
    features, flat = random_features(chain, 1), FlatWeights(chain)
    assert error(flat.inverse(flat(features)), features) == 0
    assert broken(flat, network("cnn", "positive")[1], features) > 1e-2


@pytest.mark.parametrize("kind", ["mlp", "cnn", "no bias", "cnn, flattened"])
def test_graph_pool_keeps_permutations_only(kind):
    chain, symmetry = network(kind, None)
    pool, features = GraphPool(chain, 2, width=8, rounds=2).double(), random_features(chain)
    assert broken(pool, symmetry, features) < EXACT
    assert broken(pool, network(kind, "positive")[1], features) > 1e-4
