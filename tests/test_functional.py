"""Pure steps and ``higher`` are the rule: held against a naive loop with autograd, in float64."""

import sys

import pytest
import torch
from torch import nn

from learned_opt.functional import functional
from learned_opt.higher import register_higher
from learned_opt.optimizer import NFNOpt
from learned_opt.rules import RULES
from learned_opt.symmetry import SymmetryError, independent
from tests.rules.classic import SGD, Adam, Gated

CLASSIC = {"adam": Adam, "sgd": SGD, "gated": Gated}
LR = dict.fromkeys(CLASSIC, 1e-2)
STEPS = 4

every_rule = pytest.mark.parametrize("name", sorted({**RULES, **CLASSIC}))


def make_rule(name):
    rule, generator = {**RULES, **CLASSIC}[name]().double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return rule


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model, params):
    y = torch.func.functional_call(model, params, (X,))
    return (y - torch.sin(X[:, :2])).square().mean()


def naive(model, rule, symmetry, lr, start, theta, steps=STEPS):
    """Final loss of a plain loop over ``rule``, differentiable in ``start`` and ``theta``."""
    params, state = start, rule.init({n: p.detach() for n, p in start.items()}, symmetry)
    for _ in range(steps):
        grads = torch.autograd.grad(loss_of(model, params), list(params.values()), create_graph=True)
        grads = dict(zip(params, grads, strict=True))
        options = {"total_steps": 30, "weight_decay": 0.1}
        updates, state = torch.func.functional_call(rule, theta, (params, grads, state, symmetry), options)
        params = {n: p + lr * updates[n] for n, p in params.items()}
    return loss_of(model, params)


def meta_gradient(loss, *trees):
    leaves = [x for tree in trees for x in tree.values()]
    return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def setting(name):
    model, rule = make_model(), make_rule(name)
    start = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    theta = dict(rule.named_parameters())
    symmetry, lr = independent(start), LR.get(name, 1.0)
    reference = meta_gradient(naive(model, rule, symmetry, lr, start, theta), start, theta)
    return model, rule, symmetry, lr, start, theta, reference


def assert_same(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# --------------------------------------------------------------------------------------- functional
@every_rule
def test_a_functional_loop_has_the_meta_gradient_of_the_naive_loop(name):
    model, rule, symmetry, lr, start, theta, reference = setting(name)
    init, update = functional(rule, symmetry, lr=lr, weight_decay=0.1, total_steps=30)

    def final_loss(params, theta):
        state = init(params)
        for _ in range(STEPS):
            grads = torch.func.grad(lambda p: loss_of(model, p))(params)
            params, state = update(params, grads, state, weights=theta)
        return loss_of(model, params)

    gradients, loss = torch.func.grad_and_value(final_loss, argnums=(0, 1))(start, theta)
    leaves = tuple(g for tree in gradients for g in tree.values())
    assert_same((loss, leaves), reference)


@every_rule
def test_weights_in_the_module_receive_gradients_too(name):
    model, rule, symmetry, lr, start, theta, reference = setting(name)
    init, update = functional(rule, symmetry, lr=lr, weight_decay=0.1, total_steps=30)
    params, state = start, init(start)
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss_of(model, params), list(params.values()), create_graph=True)
        params, state = update(params, dict(zip(params, grads, strict=True)), state)
    assert_same(meta_gradient(loss_of(model, params), start, theta), reference)


@every_rule
def test_functional_loops_run_under_vmap(name):
    model, rule = make_model(), make_rule(name)
    init, update = functional(rule, lr=LR.get(name, 1.0))
    generator = torch.Generator().manual_seed(3)
    batch = {n: torch.randn(3, *p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}

    def train(params):
        state = init(params)
        for _ in range(STEPS):
            grads = torch.func.grad(lambda p: loss_of(model, p))(params)
            params, state = update(params, grads, state)
        return params

    with torch.no_grad():
        together = torch.func.vmap(train)(batch)
        alone = [train({n: p[i] for n, p in batch.items()}) for i in range(3)]
    assert_same(together, {n: torch.stack([a[n] for a in alone]) for n in batch})


@pytest.mark.parametrize("maximize", [False, True])
def test_pure_steps_are_those_of_the_optimizer(maximize):
    model = make_model()
    options = {"lr": 0.5, "total_steps": 9, "weight_decay": 0.1, "maximize": maximize}
    optimizer = NFNOpt(model.named_parameters(), symmetry="independent", rule=make_rule("auto_lr"), **options)
    init, update = functional(optimizer.rule, **options)
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = init(params)
    for _ in range(STEPS):
        grads = torch.func.grad(lambda p: loss_of(model, p))(params)
        params, state = update(params, grads, state)
        for n, p in model.named_parameters():
            p.grad = grads[n]
        optimizer.step()
        assert_same(dict(model.named_parameters()), params, 1e-13)


def test_only_what_has_a_gradient_moves():
    params = {n: p.detach() for n, p in make_model().named_parameters()}
    init, update = functional(make_rule("auto_lr"))
    state = init(params)
    new, new_state = update(params, {"0.weight": torch.ones_like(params["0.weight"])}, state)
    assert new.keys() == params.keys() and new_state.keys() == state.keys()
    assert [n for n in params if not torch.equal(new[n], params[n])] == ["0.weight"]
    assert sorted(new_state["tensor"]["step"].tolist()) == [0, 0, 0, 1]


def test_a_symmetry_that_does_not_fit_is_refused():
    params = {n: p.detach() for n, p in make_model().named_parameters()}
    init, _ = functional(make_rule("auto_lr"), independent({"0.weight": torch.ones(1)}))
    with pytest.raises(SymmetryError, match=r"0\.weight"):
        init(params)


# ------------------------------------------------------------------------------------------- higher
@pytest.fixture
def higher():
    package = pytest.importorskip("higher")
    register_higher()
    register_higher()
    return package


def optimizer_for(model, rule, symmetry, lr):
    return NFNOpt(
        model.named_parameters(),
        symmetry=symmetry,
        lr=lr,
        weight_decay=0.1,
        total_steps=30,
        rule=rule,
    )


def unroll(fmodel, diffopt, model, steps=STEPS):
    names = [n for n, _ in model.named_parameters()]

    def loss():
        return loss_of(model, dict(zip(names, fmodel.parameters(), strict=True)))

    for _ in range(steps):
        diffopt.step(loss())
    return loss()


@every_rule
def test_higher_has_the_meta_gradient_of_the_naive_loop(higher, name):
    model, rule, symmetry, lr, start, theta, reference = setting(name)
    optimizer = optimizer_for(model, rule, symmetry, lr)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        loss = unroll(fmodel, diffopt, model)
        assert_same(meta_gradient(loss, dict(model.named_parameters()), diffopt.weights), reference)
    assert_same(dict(model.named_parameters()), start, 0)


def test_higher_takes_weights_and_options_by_override(higher):
    model, rule, symmetry, rate, start, theta, reference = setting("gated")
    other = Gated().double()  # its own weights must not matter
    optimizer = optimizer_for(model, other, symmetry, 123.0)
    own = {n: t.detach().clone().requires_grad_() for n, t in theta.items()}
    lr = torch.full((), rate, dtype=torch.float64, requires_grad=True)
    override = {"weights": [own], "lr": [lr]}
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, override=override) as (
        fmodel,
        diffopt,
    ):
        loss = unroll(fmodel, diffopt, model)
        assert diffopt.weights is own
    (by_lr,) = torch.autograd.grad(loss, lr, retain_graph=True)
    assert_same(meta_gradient(loss, dict(model.named_parameters()), own), reference)

    h = 1e-6
    with torch.enable_grad():
        up, down = (naive(model, rule, symmetry, rate + e, start, theta) for e in (h, -h))
    torch.testing.assert_close(by_lr, ((up - down) / (2 * h)).detach(), rtol=1e-4, atol=1e-8)


def test_higher_continues_a_used_optimizer(higher):
    model, rule, symmetry, lr, start, theta, _ = setting("auto_lr")
    optimizer = optimizer_for(model, rule, symmetry, lr)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, dict(model.named_parameters())).backward()
        optimizer.step()
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        loss = unroll(fmodel, diffopt, model, steps=2)
    assert_same(loss, naive(model, rule, symmetry, lr, start, theta, steps=5))
    assert all(s["step"] == 3 for s in optimizer.state.values())


@pytest.mark.parametrize("name", sorted(RULES))
def test_layers_trained_in_turn_age_alike_in_all_forms(higher, name):
    """First one layer has gradients, then the other, which is new to the state but not to the schedule."""
    model, rule, symmetry, lr, start, _, _ = setting(name)
    optimizer = optimizer_for(model, rule, symmetry, lr)

    def in_turn(params, step):
        alone = {4: "0", 5: "0"}.get(step, "2")  # the first layer's turn, after which the second's state goes on
        return loss_of(model, {n: p if n[0] == alone else p.detach() for n, p in params.items()})

    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fmodel, diffopt):
        for step in range(8):
            diffopt.step(in_turn(dict(fmodel.named_parameters()), step))
        theirs = {n: p.detach() for n, p in fmodel.named_parameters()}
    init, update = functional(rule, symmetry, lr=lr, weight_decay=0.1, total_steps=30)
    params, state = start, init({n: p.detach() for n, p in start.items()})
    for step in range(8):
        grads = torch.autograd.grad(in_turn(params, step), list(params.values()), allow_unused=True)
        grads = {n: g for n, g in zip(params, grads, strict=True) if g is not None}
        params, state = update(params, grads, state)
        params = {n: p.detach().requires_grad_() for n, p in params.items()}
        optimizer.zero_grad()
        in_turn(dict(model.named_parameters()), step).backward()
        optimizer.step()
    ours = {n: p.detach() for n, p in model.named_parameters()}
    assert_same(theirs, ours)
    if name != "learned":  # which sees all tensors that have state: in the pure form from the first step
        assert_same({n: p.detach() for n, p in params.items()}, ours)


def test_higher_in_test_mode_keeps_no_graph(higher):
    model, rule, symmetry, lr, start, theta, reference = setting("auto_lr")
    optimizer = optimizer_for(model, rule, symmetry, lr)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fmodel, diffopt):
        loss = unroll(fmodel, diffopt, model)
        assert all(p.is_leaf for p in fmodel.parameters())
    assert_same(loss.detach(), reference[0])


def test_higher_respects_groups_frozen_weights_and_maximize(higher):
    model, mirror = make_model(), make_model()

    def build(m):
        m[0].bias.requires_grad_(False)
        groups = [
            {"params": list(m[0].named_parameters("0")), "lr": 0.01},
            {"params": list(m[2].named_parameters("2")), "lr": 0.02, "maximize": True},
        ]
        return NFNOpt(groups, symmetry="independent", rule=Adam(), weight_decay=0.1)

    with higher.innerloop_ctx(model, build(model)) as (fmodel, diffopt):
        unroll(fmodel, diffopt, model)
        ours = [p.detach() for p in fmodel.parameters()]
    optimizer = build(mirror)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(mirror, dict(mirror.named_parameters())).backward()
        optimizer.step()
    assert_same(ours, [p.detach() for p in mirror.parameters()])


def test_without_higher_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "higher", None)
    with pytest.raises(ImportError, match="pip install higher"):
        register_higher()
