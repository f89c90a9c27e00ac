"""One step in all its forms: pure and in place, told its age or not, alone and in a batch of runs."""

import copy

import pytest
import torch
from torch import nn

from learned_opt.buffers import Buffers
from learned_opt.functional import apply_rule
from learned_opt.rules import RULES
from tasks.conv import cnn
from tasks.mlp import mlp
from tests.inferred import infer

NETWORKS = {
    "relu": lambda: mlp([6, 7, 7, 5], "relu"),
    "cnn": lambda: cnn((2, 4, 4), (6, 5), 2, "relu", norm=True),
}
every = pytest.mark.parametrize("name,network", [(r, n) for r in RULES for n in NETWORKS])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def setting(network, dtype=torch.float32):
    torch.manual_seed(0)
    model = NETWORKS[network]().to(dtype)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, infer(NETWORKS[network]())


def gradients(params, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@every
def test_in_place_and_pure_steps_are_equal_bit_for_bit(name, network):
    params, symmetry = setting(network)
    rule = RULES[name]()
    state, buffers = rule.init(params, symmetry), Buffers(rule, params, symmetry)
    for t in range(73):  # 72: roots are due, second moments are not
        grads = gradients(params, t)
        before = copy.deepcopy(state) if t % 12 == 0 else None
        pure, after = rule(params, grads, state, symmetry, total_steps=80)
        if before is not None:
            assert_equal(state, before)
        theirs, new = rule(params, grads, buffers.state, symmetry, total_steps=80, in_place=True)
        buffers.take(new, grads)
        assert_equal(theirs, pure)
        state, params = after, {n: p + pure[n] for n, p in params.items()}
    for key, slots in state.items():
        assert_equal({k: buffers.state[key][k] for k in slots}, slots)


@every
def test_told_its_age_or_not_a_step_is_the_same(name, network):
    params, symmetry = setting(network)
    rule = RULES[name]()
    told = untold = rule.init(params, symmetry)
    for t in range(1, 75):
        grads = gradients(params, t)
        a, told = rule(params, grads, told, symmetry, ages={t})
        b, untold = rule(params, grads, untold, symmetry)
        assert_equal(a, b)
    assert_equal(told, untold)


@every
@pytest.mark.parametrize("total", [None, 60])
def test_a_batch_of_runs_of_different_ages_is_each_run_alone(name, network, total):
    params, symmetry = setting(network, torch.float64)
    rule, ages, runs = RULES[name]().double(), (0, 1, 7, 9, 48), []
    for i, age in enumerate(ages):
        p = {n: x + 0.1 * torch.randn_like(x) for n, x in params.items()}
        state = rule.init(p, symmetry)
        for t in range(age):
            updates, state = rule(p, gradients(p, 100 * i + t), state, symmetry, total_steps=total)
            p = {n: x + updates[n] for n, x in p.items()}
        runs.append((p, state))

    def step(p, g, s):
        return apply_rule(rule, p, g, s, symmetry, total_steps=total)

    def stack(trees):
        if isinstance(trees[0], dict):
            return {k: stack([t[k] for t in trees]) for k in trees[0]}
        return torch.stack(trees)

    together = stack([p for p, _ in runs]), stack([s for _, s in runs])
    for t in range(26):
        grads = [gradients(params, 1000 + 10 * i + 100 * t) for i in range(len(ages))]
        updates, state = torch.func.vmap(step)(together[0], stack(grads), together[1])
        together = {n: x + updates[n] for n, x in together[0].items()}, state
        for i, (p, s) in enumerate(runs):
            u, s = step(p, grads[i], s)
            runs[i] = {n: x + u[n] for n, x in p.items()}, s
        torch.testing.assert_close(together[0], stack([p for p, _ in runs]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", RULES)
def test_a_tensor_that_joined_late_is_the_same_in_a_batch(name):
    params, symmetry = setting("relu", torch.float64)
    rule = RULES[name]().double()
    late = {"2.weight", "2.bias"}

    def run(params, seeds):
        state = rule.init(params, symmetry)
        for t in range(16):
            grads = {n: g for n, g in zip(params, seeds, strict=True) if t >= 5 or n not in late}
            grads = {n: g * (1 + t) for n, g in grads.items()}
            updates, state = apply_rule(rule, params, grads, state, symmetry)
            params = params | {n: params[n] + u for n, u in updates.items()}
        return params

    seeds = [torch.stack([gradients(params, s)[n] for s in range(2)]) for n in params]
    both = {n: torch.stack([p, p + 0.1]) for n, p in params.items()}
    together = torch.func.vmap(run)(both, seeds)
    for i in range(2):
        alone = run({n: p[i] for n, p in both.items()}, [g[i] for g in seeds])
        torch.testing.assert_close({n: p[i] for n, p in together.items()}, alone, rtol=1e-9, atol=1e-11)


def test_a_tensor_that_is_frozen_young_makes_nothing_due_for_the_others():
    """Second moments change at every fifth step, whatever the age at which another tensor stopped."""
    from learned_opt import NFNOpt

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 8))
    optimizer = NFNOpt(model, symmetry="independent")
    changed = []
    for t in range(1, 21):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if t > 2:
            model[2].requires_grad_(False).zero_grad()
        before = optimizer.state[model[0].weight].get("moment0", torch.zeros(())).clone()
        optimizer.step()
        if not torch.equal(before, optimizer.state[model[0].weight]["moment0"]):
            changed.append(t)
    assert changed == [1, 2, 3, 5, 10, 15, 20]
