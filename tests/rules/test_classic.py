"""The classic rules are torch's optimizers step for step; the Newton-Schulz iteration is Muon's."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from learned_opt.adapters import functional
from learned_opt.rules import polar
from learned_opt.rules.classic import SGD, Adam, Muon
from learned_opt.rules.polar import newton_schulz
from learned_opt.symmetry import Spec, Symmetry
from learned_opt.symmetry.axes import Leaf

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


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_muon_on_matrices(adjust, nesterov):
    shapes = {"tall": (9, 4), "wide": (3, 8), "square": (5, 5), "row": (1, 6)}
    options = {"momentum": 0.9, "nesterov": nesterov, "ns_steps": 4}
    ours = trajectory(Muon(adjust=adjust, **options), torch.float64, 100, 0.02, 0.1, shapes)

    def make(p):
        return torch.optim.Muon(p, 0.02, 0.1, adjust_lr_fn=adjust, **options)

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
    state = rule.init(params)
    as_embedding, _ = rule(params, grads, state, embedding)
    as_matrix, _ = rule(params, grads, state, matrix)
    by_adam, _ = Adam()(params, grads, Adam().init(params), embedding)
    torch.testing.assert_close(as_embedding, by_adam, rtol=0, atol=0)
    assert not torch.allclose(as_matrix["e"], by_adam["e"])


def test_muon_refuses_an_unknown_adjustment():
    with pytest.raises(ValueError, match="match_rms_adamw"):
        Muon(adjust="none")


@pytest.mark.parametrize("rule", [Adam(), SGD(), Muon(dtype=torch.float64)], ids=str)
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


@pytest.mark.parametrize("rule", [Adam(), SGD(), Muon()], ids=str)
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


# ------------------------------------------------------------------------------------ Newton-Schulz
@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (1, 9), (40, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_schulz_in_bfloat16_is_torch_muons(shape, dtype):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    theirs = _zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(newton_schulz(x, dtype=torch.bfloat16), theirs, rtol=0, atol=1e-2)


def test_newton_schulz_brings_singular_values_near_one_and_keeps_singular_vectors():
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    inner = u.T @ newton_schulz(x) @ vt.T
    values = inner.diagonal()
    assert (inner - values.diag()).abs().max() < 1e-12
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-3, 1e30, 1e37])
def test_newton_schulz_does_not_depend_on_the_scale(scale):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    torch.testing.assert_close(newton_schulz(x * scale), newton_schulz(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
@pytest.mark.parametrize("rank", [1, 12])
def test_newton_schulz_of_a_wide_matrix_is_what_the_plain_iteration_gives(steps, rank):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, rank, generator=generator) @ torch.randn(2, rank, 60, generator=generator)
    y = x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True)
    for _ in range(steps):
        gram = y @ y.mT
        y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
    torch.testing.assert_close(newton_schulz(x.double(), steps), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(newton_schulz(x.mT, steps).mT, y.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision, on_gram", [("highest", True), ("high", False), ("medium", False)])
def test_newton_schulz_of_a_wide_matrix_is_plain_where_products_are_rounded(precision, on_gram):
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(newton_schulz(x), polar._iterate(polar.unit_norm(x, x.dtype), 5)) != on_gram
    finally:
        torch.set_float32_matmul_precision(before)


def test_newton_schulz_of_zero_is_zero_with_finite_derivative():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    y = newton_schulz(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and x.grad.isfinite().all()


def test_newton_schulz_of_a_batch_is_that_of_each_matrix():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = torch.stack([torch.stack([newton_schulz(m) for m in row]) for row in x])
    vmapped = torch.func.vmap(torch.func.vmap(newton_schulz))(x)
    torch.testing.assert_close(newton_schulz(x), each, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vmapped, each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (2, 2, 7)])
def test_newton_schulz_has_the_right_derivatives(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(newton_schulz, (x,))
    assert torch.autograd.gradgradcheck(newton_schulz, (x,))
