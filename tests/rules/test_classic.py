"""The classic rules are torch's optimizers step for step: what the other tests take them for."""

import pytest
import torch

from learned_opt.functional import functional
from learned_opt.symmetry import Spec, Symmetry
from learned_opt.symmetry.axes import Leaf
from tests.rules.classic import SGD, Adam, Muon

SHAPES = {"w": (7, 5), "conv": (4, 3, 2, 2), "b": (6,), "s": ()}


def random_weights(seed, dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}


def trajectory(rule, dtype, steps, lr, weight_decay, shapes=SHAPES):
    init, update = functional(rule, lr=lr, weight_decay=weight_decay)
    params = random_weights(0, dtype, shapes)
    state = init(params)
    for seed in range(1, steps + 1):
        params, state = update(params, random_weights(seed, dtype, shapes), state)
    return params


def torch_trajectory(make, dtype, steps, shapes=SHAPES):
    params = random_weights(0, dtype, shapes)
    optimizer = make(list(params.values()))
    for seed in range(1, steps + 1):
        for n, g in random_weights(seed, dtype, shapes).items():
            params[n].grad = g
        optimizer.step()
    return {n: p.detach() for n, p in params.items()}


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.0, 0.95), 1e-3)])
def test_adam_is_torch_adamw(dtype, tol, weight_decay, betas, eps):
    ours = trajectory(Adam(betas, eps), dtype, 100, 0.01, weight_decay)
    theirs = torch_trajectory(lambda p: torch.optim.AdamW(p, 0.01, betas, eps, weight_decay), dtype, 100)
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


def test_adam_without_weight_decay_is_torch_adam():
    ours = trajectory(Adam(), torch.float64, 100, 0.01, 0.0)
    theirs = torch_trajectory(lambda p: torch.optim.Adam(p, 0.01), torch.float64, 100)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_sgd(momentum):
    ours = trajectory(SGD(momentum), torch.float64, 100, 0.01, 0.0)
    theirs = torch_trajectory(lambda p: torch.optim.SGD(p, 0.01, momentum=momentum), torch.float64, 100)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_muon_is_torch_muon_on_matrices():
    shapes = {"tall": (9, 4), "wide": (3, 8), "square": (5, 5), "row": (1, 6)}
    ours = trajectory(Muon(), torch.float64, 100, 0.02, 0.1, shapes)

    def make(p):
        return torch.optim.Muon(p, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")

    theirs = torch_trajectory(make, torch.float64, 100, shapes)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_muon_leaves_all_but_matrices_to_adamw():
    rest = {n: s for n, s in SHAPES.items() if len(s) != 2}
    ours = trajectory(Muon(), torch.float64, 20, 0.01, 0.1, rest)
    adamw = trajectory(Adam(), torch.float64, 20, 0.01, 0.1, rest)
    torch.testing.assert_close(ours, adamw, rtol=0, atol=0)


def test_muon_leaves_embeddings_to_adamw():
    shape = {"e": (11, 4)}
    axes = (Leaf(11), Leaf(4))
    embedding = Symmetry({"e": Spec(axes, ("lookup", "out"))})
    matrix = Symmetry({"e": Spec(axes, ("out", "in"))})
    params, grads = random_weights(0, torch.float64, shape), random_weights(1, torch.float64, shape)
    rule = Muon()
    state = rule.init(params, embedding)
    as_embedding, _ = rule(params, grads, state, embedding)
    as_matrix, _ = rule(params, grads, state, matrix)
    by_adam, _ = Adam()(params, grads, Adam().init(params, embedding), embedding)
    torch.testing.assert_close(as_embedding, by_adam, rtol=0, atol=0)
    assert not torch.allclose(as_matrix["e"], by_adam["e"])


@pytest.mark.parametrize("rule", [Adam(), SGD()], ids=str)
def test_a_batch_of_networks_under_vmap_is_each_network_alone(rule):
    init, update = functional(rule, lr=0.01, weight_decay=0.1)
    networks = [random_weights(s, torch.float64) for s in range(3)]
    grads = [random_weights(10 + s, torch.float64) for s in range(3)]

    def two_steps(params, g):
        params, state = update(params, g, init(params))
        return update(params, g, state)[0]

    def stack(trees):
        return {n: torch.stack([t[n] for t in trees]) for n in trees[0]}

    together = torch.func.vmap(two_steps)(stack(networks), stack(grads))
    alone = stack([two_steps(p, g) for p, g in zip(networks, grads, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [Adam(), SGD()], ids=str)
def test_derivatives_are_finite_at_zero_gradients(rule):
    params = random_weights(0, torch.float64)
    init, update = functional(rule, lr=0.01)

    def moved(scale):
        grads = {n: scale * torch.zeros_like(p) for n, p in params.items()}
        new, state = update(params, grads, init(params))
        new, _ = update(new, grads, state)
        return sum(p.sum() for p in new.values())

    zero = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(moved(zero), zero)
    assert gradient.isfinite()
