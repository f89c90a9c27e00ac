"""The papers' stacks: official sizes, what they keep, what they refuse."""

import pytest
import torch
from torch import nn

from learned_opt import SymmetryError
from learned_opt.nfn import (
    EquivariantNFN,
    HNPLinear,
    InvariantNFN,
    MAGEPLinear,
    MonomialLinear,
    NPLinear,
    UnitPool,
    inr_classifier,
)
from tests.nfn.chains import broken, chain_of, mlp, network, random_features, zoo_cnn

EXACT = 1e-12


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (NPLinear, (37_056, 564_096, 176_280)),
        (lambda *a: NPLinear(*a, io_embed=True), (37_085, 564_560, 176_744)),
        (HNPLinear, (72_656, 1_132_256, 353_830)),
        (MonomialLinear, (7_584, 118_944, 37_170)),
    ],
)
def test_layers_have_the_official_number_of_parameters(make, wanted):
    chain = chain_of(zoo_cnn())
    assert tuple(count(make(chain, n, m)) for n, m in ((1, 16), (16, 16), (16, 5))) == wanted


def test_magep_layer_has_the_official_number_of_parameters():
    assert count(MAGEPLinear(chain_of(zoo_cnn()).without_kernels(), 16, 16)) == 226_464


ZOO = {"stat": 1_059_001, "np": 2_031_390, "hnp": 2_811_743, "monomial": 254_619, "magep": 998_121}


@pytest.mark.parametrize("act_of", [nn.ReLU, nn.Tanh])
def test_zoo_models_have_the_official_number_of_parameters(act_of):
    chain = chain_of(zoo_cnn(act_of))
    assert {k: count(InvariantNFN(chain, 1, k)) for k in ZOO} == ZOO
    assert count(InvariantNFN(chain, 1, "monomial", head_width=1000)) == 1_417_019


def test_inr_models_have_the_official_number_of_parameters():
    grey, colour = (chain_of(mlp([2, 32, 32, o], nn.Tanh)) for o in (1, 3))
    with torch.device("meta"):
        assert count(inr_classifier(grey, "hnp")) == 22_083_114
        assert count(inr_classifier(grey, "np")) == 15_118_634
        assert count(inr_classifier(grey, "monomial")) == 22_146_603
        assert count(inr_classifier(grey, "magep")) == 4_074_538
        assert count(inr_classifier(grey, "mlp")) == 2_197_010
        assert count(inr_classifier(grey, "monomial", "fashion")) == 20_494_603
        assert count(inr_classifier(colour, "hnp", "cifar")) == 42_379_306
        assert count(inr_classifier(colour, "np", "cifar")) == 16_237_866
        assert count(inr_classifier(colour, "monomial", "cifar")) == 16_248_045
        assert count(inr_classifier(colour, "magep", "cifar")) == 3_425_578
        assert count(EquivariantNFN(grey, "hnp")) == 6_440_853
        assert count(EquivariantNFN(grey, "np")) == 4_181_272
        assert count(EquivariantNFN(grey, "monomial")) == 4_181_769
        assert count(EquivariantNFN(grey, "magep")) == 4_201_288
        assert count(EquivariantNFN(grey, "mlp")) == 4_374_191
        assert count(EquivariantNFN(colour, "np")) == 4_181_272
        assert count(EquivariantNFN(colour, "monomial")) == 4_182_443


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("scale", ["positive", "sign"])
def test_predictors_keep_what_they_claim(kind, scale):
    chain, symmetry = network(kind, scale)
    _, permutations = network(kind, None)
    features = random_features(chain, 1)
    for name in ("stat", "np", "hnp", "graph", "monomial", "magep"):
        model = InvariantNFN(chain, 2, name, head_width=8).double()
        assert broken(model, permutations, features) < EXACT
        exact = name in ("monomial", "magep")
        assert (broken(model, symmetry, features) < EXACT) == exact
    for name in ("monomial", "magep"):
        units = InvariantNFN(chain, 2, name, head_width=8, pool="units", norm=True).double().eval()
        assert broken(units, symmetry, features) < EXACT
    assert broken(InvariantNFN(chain, 2, "mlp", head_width=8).double(), permutations, features) > 1e-4


def test_classifier_of_sine_networks_is_sign_invariant_behind_its_front():
    chain, symmetry = network("mlp", "sine")
    model = InvariantNFN(chain, 2, "hnp", channels=(4,), head_width=8, front=3, fourier=0.1).double()
    assert broken(model, symmetry, random_features(chain, 1)) < EXACT
    bare = InvariantNFN(chain, 2, "hnp", channels=(4,), head_width=8, fourier=0.1).double()
    assert broken(bare, symmetry, random_features(chain, 1)) > 1e-4


@pytest.mark.parametrize("scale", ["positive", "sign"])
def test_editors_keep_what_they_claim(scale):
    chain, symmetry = network("mlp", scale)
    _, permutations = network("mlp", None)
    features = random_features(chain, 1)

    def change(model):  # the weights themselves would hide the change
        return lambda f: {n: x - f[n] for n, x in model(f).items()}

    exact = change(EquivariantNFN(chain, "exact", width=4, depth=2).double())
    assert broken(exact, symmetry, features) < 1e-11
    hnp = change(EquivariantNFN(chain, "hnp", width=4, depth=2, fourier=0.1).double())
    assert broken(hnp, permutations, features) < 1e-11
    assert broken(hnp, symmetry, features) > 1e-3


def test_models_refuse_what_cannot_be():
    chain, _ = network("mlp", None)
    sine, _ = network("mlp", "sine")
    with pytest.raises(SymmetryError, match="hnp"):
        InvariantNFN(chain, 1, "monomial")
    with pytest.raises(SymmetryError, match="front"):
        InvariantNFN(sine, 1, "monomial", fourier=1.0)
    with pytest.raises(SymmetryError, match="hnp"):
        EquivariantNFN(chain, "exact")
    with pytest.raises(SymmetryError, match="sign"):
        InvariantNFN(sine, 1, "monomial", activation="relu")
    for kind, pool in (("hnp", "units"), ("monomial", "mean")):
        with pytest.raises(SymmetryError, match="official"):
            InvariantNFN(sine, 1, kind, pool=pool)
    with pytest.raises(SymmetryError, match="3 channels, the layer reads 2"):  # of gradients, say
        UnitPool(sine, 2)(random_features(sine, 3))
    with pytest.raises(ValueError, match="cifar"):
        inr_classifier(sine, "np", "svhn")


@pytest.mark.parametrize("name", ["np", "hnp", "monomial", "magep", "stat", "mlp", "graph"])
def test_models_move_and_reload_like_any_module(name):
    chain, _ = network("cnn", "sign")
    first, second = (InvariantNFN(chain, 2, name, head_width=8).to(torch.float64).eval() for _ in range(2))
    features = random_features(chain, 1)
    assert not torch.equal(first(features), second(features))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(features), second(features))
    first(features).sum().backward()
    assert all(p.grad is not None for p in first.parameters())
