"""Parameters, their names and groups under a symmetry that is given."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn

from learned_opt.optimizer import NFNOpt
from learned_opt.params import renamed
from learned_opt.symmetry import Label, Leaf, Scale, Spec, Symmetry, SymmetryError
from learned_opt.symmetry.infer import infer_symmetry
from tests.optimizer_contract import (
    LR,
    assert_equal,
    backward,
    chain_symmetry,
    every_rule,
    make,
    make_model,
    make_rule,
    train,
    weights,
)
from tests.rules.classic import Adam


@every_rule
def test_every_way_to_pass_the_parameters_trains_alike(name):
    ways = [
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters()}],
        lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}],
        lambda m: [
            {"params": list(m.named_parameters())[:2]},
            {"params": m[2].named_parameters("2")},
        ],
    ]
    results = []
    for way in ways:
        model = make_model()
        symmetry = chain_symmetry(model)
        optimizer = NFNOpt(way(model), symmetry=symmetry, rule=make_rule(name), lr=LR.get(name, 1.0))
        train(model, optimizer, 3)
        results.append(weights(model))
    for other in results[1:]:
        assert_equal(other, results[0])


@every_rule
def test_a_network_relabelled_trains_relabelled(name):
    model, moved = make_model(torch.float64), make_model(torch.float64)
    symmetry = chain_symmetry(model)
    g = symmetry.sample(torch.Generator().manual_seed(0))
    moved.load_state_dict(symmetry.act(g, weights(model)))
    for m in (model, moved):
        train(m, make(name, m, symmetry=symmetry), 5)
    expected = symmetry.act(g, weights(model))
    tol = 1e-1 if name == "muon" else 1e-9  # Muon rounds to bfloat16, in another order of the rows
    torch.testing.assert_close(weights(moved), expected, rtol=tol, atol=tol)


PREFIXES = (
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.",
    "module._fsdp_wrapped_module.module._orig_mod.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("inside", ["", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._orig_mod."])
def test_wrappers_prefixes_do_not_hide_a_name(prefix, inside):
    def wrapped(name):
        return prefix + name.replace(".", f".{inside}")

    def train_as(symmetry, name):
        model = make_model()
        optimizer = NFNOpt([(name(n), p) for n, p in model.named_parameters()], symmetry=symmetry)
        train(model, optimizer, 2)
        return weights(model), optimizer.state_dict()

    plain = chain_symmetry(make_model())
    other = renamed(plain, wrapped, lambda label: label)
    expected, saved = train_as(plain, lambda n: n)
    for symmetry, name in ((plain, wrapped), (other, lambda n: n), (other, wrapped)):
        found, state = train_as(symmetry, name)
        assert_equal(found, expected)
        NFNOpt(make_model().named_parameters(), symmetry=plain).load_state_dict(state)
        again = [(name(n), p) for n, p in make_model().named_parameters()]
        NFNOpt(again, symmetry=symmetry).load_state_dict(saved)
    g = plain.sample(torch.Generator().manual_seed(0))
    moved = plain.act(g, {wrapped(n): w for n, w in expected.items()})
    assert_equal(moved, {wrapped(n): w for n, w in plain.act(g, expected).items()})
    assert not torch.equal(moved[wrapped("0.bias")], expected["0.bias"])


def test_a_module_that_is_called_module_is_not_a_wrapper_where_names_would_clash():
    model = nn.ModuleDict({"module": make_model(), "net": make_model(seed=1)})
    symmetry = infer_symmetry(Both(model), torch.randn(3, 5))
    optimizer = NFNOpt(Both(model).named_parameters(), symmetry=symmetry)
    assert [e.name for e in optimizer._bind()[0]] == [n for n, _ in Both(model).named_parameters()]


class Both(nn.Module):
    """Holds a submodule ``module`` beside the same names without it."""

    def __init__(self, models):
        super().__init__()
        self.module = models["module"]
        self.add_module("0", models["net"][0])
        self.add_module("2", models["net"][2])

    def forward(self, x):
        return self.module(x) + self.get_submodule("2")(self.get_submodule("0")(x).tanh())


def test_a_symmetry_may_describe_more_than_is_trained():
    model = make_model()
    optimizer = NFNOpt(
        [(n, p) for n, p in model.named_parameters() if n != "2.bias"],
        symmetry=chain_symmetry(model),
        rule="whitened_polar",
    )
    before = weights(model)
    train(model, optimizer, 2)
    assert_equal(model[2].bias.detach(), before["2.bias"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_a_symmetry_that_does_not_fit_is_refused_with_names_and_shapes():
    model = make_model()
    symmetry = chain_symmetry(model)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(SymmetryError, match=r"0\.weight.*\(7, 5\).*\(6, 5\)"):
        NFNOpt(other.named_parameters(), symmetry=symmetry, rule=Adam())
    with pytest.raises(SymmetryError, match="extra.*not described"):
        NFNOpt(
            [*model.named_parameters(), ("extra", nn.Parameter(torch.ones(2)))],
            symmetry=symmetry,
            rule=Adam(),
        )
    with pytest.raises(SymmetryError, match=r"several.*0\.bias"):
        NFNOpt(
            [("0.bias", model[0].bias), ("module.0.bias", other[0].bias)],
            symmetry=symmetry,
            rule=Adam(),
        )
    with pytest.raises(SymmetryError, match="named_parameters"):
        NFNOpt(list(model.parameters())[::-1], symmetry=symmetry, rule=Adam())


def test_two_networks_with_the_same_names_fit_one_optimizer():
    a, b = make_model(seed=0), make_model(seed=1)
    optimizer = NFNOpt([*a.named_parameters(), *b.named_parameters()], rule=Adam(), lr=0.01)
    before = weights(a), weights(b)
    backward(a)
    backward(b)
    optimizer.step()
    assert not torch.equal(a[0].weight, before[0]["0.weight"])
    assert not torch.equal(b[0].weight, before[1]["0.weight"])


@pytest.mark.parametrize(("name", "most"), [("whitened_polar", 0.3), ("auto_lr", 0.9)])  # that begins at a lower rate
def test_the_schedule_goes_on_where_other_tensors_were_trained_before(name, most):
    model = make_model()
    optimizer = make(name, model, total_steps=10)
    model[0].requires_grad_(False)
    train(model, optimizer, 9)
    model[0].requires_grad_(True)
    model[2].requires_grad_(False)
    other = copy.deepcopy(model)
    before = weights(model)["0.weight"]
    train(model, optimizer, 1)
    train(other, make(name, other, total_steps=10), 1)
    last, first = (weights(m)["0.weight"] - before for m in (model, other))
    assert last.norm() < most * first.norm(), "the last of ten steps, though this tensor's first"
    assert [optimizer.state[model[i].weight]["step"] for i in (0, 2)] == [1, 9]


@every_rule
def test_parameters_can_be_added_in_mid_training(name):
    model, lr = make_model(), LR.get(name, 1.0)
    optimizer = NFNOpt(model[0].named_parameters("0"), symmetry="independent", rule=make_rule(name), lr=lr)
    train(model, optimizer, 2)
    before = weights(model)
    optimizer.add_param_group({"params": model[2].named_parameters("2"), "lr": 0.5 * lr})
    train(model, optimizer, 2)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.state[model[0].weight]["step"] == 4
    assert optimizer.state[model[2].weight]["step"] == 2


def test_parameters_that_the_symmetry_lacks_are_not_added():
    model = make_model()
    optimizer = NFNOpt(model.named_parameters(), symmetry=chain_symmetry(model), rule=Adam())
    with pytest.raises(SymmetryError, match="extra"):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, 1)


def test_tensors_swapped_inside_the_groups_are_followed(said):
    model = make_model()
    optimizer = make("adam", model, symmetry=chain_symmetry(model))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())  # as accelerate does
    optimizer.param_groups[0]["params"][0] = model[0].weight
    before = weights(model)
    train(model, optimizer, 1)
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert not said(logging.WARNING)
    other = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 4))
    other.grad = torch.ones(4, 4)
    optimizer.step()
    (line,) = said(logging.WARNING)
    assert "0.weight (now (4, 4))" in line and (other != 1).all()


@pytest.mark.parametrize(("change", "left"), [(lambda groups: groups.pop(0), 4), (lambda groups: groups.reverse(), 6)])
def test_tensors_keep_their_names_when_groups_change(change, left):
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    optimizer = NFNOpt([{"params": model[i].parameters()} for i in (0, 2, 4)])
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    change(optimizer.param_groups)
    optimizer.step()
    names = {e.name: e.param for e in optimizer._bind()[0]}
    assert len(names) == left
    assert all(model.get_parameter(n) is p for n, p in names.items())


def test_a_group_may_go_and_return_and_be_saved_at_once():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    optimizer = NFNOpt([{"params": model[i].parameters()} for i in (0, 2, 4)])
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    first = optimizer.param_groups.pop(0)
    for p in first["params"]:
        del optimizer.state[p]
    saved = NFNOpt([{"params": model[i].parameters()} for i in (2, 4)])
    saved.load_state_dict(optimizer.state_dict())
    for copied in (saved, copy.deepcopy(optimizer)):
        assert [e.name for e in copied._bind()[0]] == ["2.weight", "2.bias", "4.weight", "4.bias"]
    optimizer.step()
    optimizer.param_groups.append(first)
    optimizer.step()
    names = {e.name: e.param for e in optimizer._bind()[0]}
    assert len(names) == 6 and all(model.get_parameter(n) is p for n, p in names.items())


def test_running_statistics_do_not_count_as_positions():
    """A symmetry describes them; an optimizer has none."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    symmetry = infer_symmetry(model, torch.randn(2, 1, 4, 4))
    assert "1.running_mean" in symmetry.specs
    optimizer = NFNOpt(model.parameters(), symmetry=symmetry, rule=Adam())
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    assert [e.name for e in optimizer._bind()[0]] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("weight", list(itertools.product(("out", "in", "kernel", "lookup", "gain"), repeat=2)))
@pytest.mark.parametrize("bias", ["out", "in"])
def test_a_symmetry_written_by_hand_trains_whatever_its_roles(weight, bias):
    def unit(exponent):
        return Leaf(6, "h", (("s", exponent),))

    specs = {"0.weight": Spec((unit(1), Leaf(5)), weight), "0.bias": Spec((unit(1),), (bias,))}
    specs |= {"2.weight": Spec((Leaf(3), unit(-1)), ("out", "in")), "2.bias": Spec((Leaf(3),), ("out",))}
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = NFNOpt(model, symmetry=Symmetry(specs, {"h": Label(6)}, {"s": Scale("positive", 6, "h")}))
    before = weights(model)
    train(model, optimizer, 2)
    assert all(p.isfinite().all() and not torch.equal(p, before[n]) for n, p in model.named_parameters())
