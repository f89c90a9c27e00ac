"""What an optimizer says of its last step, tensor by tensor."""

import math

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt
from learned_opt.rules.learned import CONTROLS, FEATURES


def made(rule="learned", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 5, bias=False))
    optimizer = NFNOpt(model, rule=rule, total_steps=40, **options)
    if rule == "learned":
        with torch.no_grad():
            for p in optimizer.rule.parameters():
                p.add_(torch.randn(p.shape) / 8)
    return model, optimizer


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(0, 9, (16,))).square().mean().backward()
        optimizer.step()


def trained(rule="learned", **options):
    model, optimizer = made(rule, **options)
    train(model, optimizer, 12)
    return model, optimizer


def of(report, name):
    return next(t for t in report.tensors if t.name == name)


@pytest.mark.parametrize("rule", ["auto_lr", "whitened_polar", "learned"])
def test_every_tensor_is_there_once_with_its_kind(rule):
    report = trained(rule)[1].report()
    kinds = {t.name: t.kind for t in report.tensors}
    assert kinds == {  # the bias of 1 is a column of its matrix
        "0.weight": "embedding",
        "1.weight": "matrix",
        "3.weight": "vector",
        "3.bias": "vector",
        "4.weight": "matrix",
    }
    assert report.numbers["steps"] == 12
    assert all(name in str(report) for name in kinds)
    assert all(t.step > 0 and t.size > 0 for t in report.tensors)


def test_the_step_is_the_one_that_the_weights_made():
    model, optimizer = trained("whitened_polar", weight_decay=0.0, symmetry="independent")
    before = model[4].weight.detach().clone()
    model(torch.randint(0, 9, (16,))).square().mean().backward()
    optimizer.step()
    made = (model[4].weight.detach() - before).square().mean().sqrt()
    assert of(optimizer.report(), "4.weight").step == pytest.approx(float(made), rel=1e-2)


def test_a_tensor_has_the_controls_that_it_heeds():
    report = trained()[1].report()
    assert list(of(report, "1.weight").controls) == list(CONTROLS)
    assert list(of(report, "4.weight").controls) == [k for k in CONTROLS if k != "bias"]
    assert list(of(report, "0.weight").controls) == list(of(report, "3.weight").controls) == ["gain"]
    assert not of(trained("auto_lr")[1].report(), "1.weight").controls


def test_reasons_add_up_to_the_control():
    report = trained()[1].report()
    for t in report.tensors:
        for k, why in t.reasons.items():
            assert set(why) == {*FEATURES, "rest"}
            told = torch.tanh(torch.tensor(sum(why.values()) / CONTROLS[k])) * CONTROLS[k]
            assert float(told.exp()) == pytest.approx(t.controls[k], rel=1e-3)
            assert sorted(map(abs, why.values()), reverse=True) == list(map(abs, why.values()))


def test_a_reason_is_what_its_weight_and_its_feature_make():
    _, optimizer = trained()
    column = FEATURES.index("writes the output")
    with torch.no_grad():
        weight = float(optimizer.rule.tensor_controls.weight[0, column])
    report = optimizer.report()
    assert of(report, "4.weight").reasons["gain"]["writes the output"] == pytest.approx(weight)
    assert of(report, "1.weight").reasons["gain"]["writes the output"] == 0


def test_without_the_network_nothing_is_left_to_it():
    model, optimizer = made()
    with torch.no_grad():
        optimizer.rule.tensor_controls.weight[:, len(FEATURES) :] = 0
    train(model, optimizer, 3)  # controls are set at each of these
    report = optimizer.report()
    assert max(abs(why["rest"]) for t in report.tensors for why in t.reasons.values()) < 1e-4
    strongest, added = next(iter(of(report, "4.weight").reasons["gain"].items()))
    assert strongest in FEATURES and abs(added) > 1e-2


def test_the_table_names_the_factor_of_the_strongest_reason():
    model, optimizer = made()
    with torch.no_grad():
        optimizer.rule.tensor_controls.weight.zero_()
        optimizer.rule.tensor_controls.weight[1, FEATURES.index("matrix")] = 0.3  # of 2
    train(model, optimizer, 3)
    assert of(optimizer.report(), "4.weight").controls["fresh"] == pytest.approx(math.exp(2 * math.tanh(0.3)))
    assert f"fresh: matrix x{math.exp(0.6):.2f}" in str(optimizer.report())


def test_a_tensor_that_never_moved_is_left_out():
    model, optimizer = made()
    model[4].weight.register_hook(lambda g: g * float("nan"))
    train(model, optimizer, 3)
    assert {t.name for t in optimizer.report().tensors} == {"0.weight", "1.weight", "3.weight", "3.bias"}


def test_before_the_first_step_there_is_nothing_to_report():
    with pytest.raises(RuntimeError, match="no step"):
        made()[1].report()
