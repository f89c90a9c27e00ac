"""Rows without gradients: they stay, bit for bit."""

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt
from learned_opt.rules import RULES
from tests.inferred import infer

STEPS = 25  # refreshes inside


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 7))


def trained(model, silent, steps=STEPS, **options):
    """Weights before and after steps by random gradients; zero in some rows, from some step on."""
    optimizer = NFNOpt(model.named_parameters(), **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(steps):
        for n, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            p.grad[silent(n, step)] = 0
        optimizer.step()
    return before, optimizer


@pytest.mark.parametrize("weight_decay", [None, 0.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inferred", [True, False])
def test_rows_that_never_had_a_gradient_stay(rule, inferred, weight_decay):
    model = chain()
    symmetry = infer(model) if inferred else "independent"
    options = {"rule": rule, "symmetry": symmetry, "weight_decay": weight_decay, "total_steps": 40}
    before, _ = trained(model, lambda n, step: [1, 4], **options)
    for n, p in model.named_parameters():
        moved = (p != before[n]).flatten(1).any(1) if p.ndim > 1 else p != before[n]
        assert moved.tolist() == [i not in (1, 4) for i in range(len(p))], n


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_an_embedding_that_no_example_has_stay(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 5))
    optimizer = NFNOpt(model, rule=rule, total_steps=40)
    before = model[0].weight.detach().clone()
    for step in range(STEPS):
        x = torch.randint(0, 15, (6,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x % 5).backward()
        optimizer.step()
    assert torch.equal(model[0].weight[15:], before[15:])
    assert not torch.equal(model[0].weight[:15], before[:15])


def test_what_is_asked_for_decays_all_rows():
    model = chain()
    before, _ = trained(model, lambda n, step: [1, 4], symmetry="independent", weight_decay=0.1)
    for n, p in model.named_parameters():
        assert (p[[1, 4]].abs() < before[n][[1, 4]].abs()).all(), n


@pytest.mark.parametrize("inferred", [True, False])
def test_momentum_of_rows_that_fall_silent_ends_at_zero(inferred):
    """Subnormal numbers, to which it would decay, make products of matrices many times slower."""
    model = nn.Sequential(*chain(), nn.LayerNorm(7), nn.Linear(7, 3))  # gains, a matrix and a thin one
    symmetry = infer(model) if inferred else "independent"
    _, optimizer = trained(model, lambda n, step: [1, 2] if step else [], 400, symmetry=symmetry, total_steps=1000)
    for n, p in model.named_parameters():
        zero = optimizer.state[p]["m"] == 0
        assert zero[[1, 2]].all() and not zero[0].any(), n


@pytest.mark.parametrize("scale", [1e-15, 1e-25, 1e-38])
def test_rows_whose_gradients_are_negligible_stay(scale):
    """Their products would be subnormal numbers at every step, though no gradient is zero."""
    weight = nn.Parameter(torch.zeros(600, 12))  # so many rows that nothing mixes them
    optimizer = NFNOpt([weight], symmetry="independent", total_steps=40)
    for _ in range(STEPS):
        weight.grad = torch.randn_like(weight)
        weight.grad[[1, 4]] *= scale
        optimizer.step()
    moved = (weight != 0).any(1)
    assert moved.tolist() == [i not in (1, 4) for i in range(len(weight))]
