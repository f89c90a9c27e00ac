"""A small network, its data, and an optimizer of every rule: what the tests of NFNOpt share."""

import io

import pytest
import torch
from torch import nn

from learned_opt.optimizer import NFNOpt
from learned_opt.rules import RULES
from learned_opt.symmetry import Label, Leaf, Spec, Symmetry
from tests.rules.classic import SGD, Adam, Gated, Muon

CLASSIC = {"adam": Adam, "sgd": SGD, "muon": Muon, "gated": Gated}  # rules of another kind: state by tensor
LR = dict.fromkeys(CLASSIC, 1e-2)  # the others set their own rate

every_rule = pytest.mark.parametrize("name", sorted({**RULES, **CLASSIC}))


def make_rule(name):
    """The rule with its learned weights away from their start."""
    rule, generator = {**RULES, **CLASSIC}[name](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return rule


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 5, generator=generator)
    return x.to(dtype), torch.sin(x[:, :3]).to(dtype)


def backward(model, scale=1.0):
    x, y = data(next(model.parameters()).dtype)
    loss = scale * (model(x) - y).square().mean()
    model.zero_grad()
    loss.backward()
    return loss


def make(name, model, **options):
    options = {"lr": LR.get(name, 1.0), "total_steps": 50, "symmetry": "independent", **options}
    return NFNOpt(model.named_parameters(), rule=make_rule(name), **options)


def train(model, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def through_disk(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def chain_symmetry(model):
    """Its hidden units are one label: what independent axes do not say."""

    def leaf(label=None, size=6):
        return Leaf(size, label)

    return Symmetry(
        {
            "0.weight": Spec((leaf("h"), leaf(size=5)), ("out", "in")),
            "0.bias": Spec((leaf("h"),), ("out",)),
            "2.weight": Spec((leaf(size=3), leaf("h")), ("out", "in")),
            "2.bias": Spec((leaf(size=3),), ("out",)),
        },
        {"h": Label(6)},
    )
