"""One wild gradient among ordinary ones: clipped, in a way that the network's symmetry cannot change."""

import pytest
import torch
from torch import nn

from learned_opt.rules import whitened_polar
from learned_opt.rules.whitened_polar import WhitenedPolar
from tasks.mlp import mlp
from tests.inferred import infer


def trained(rule, params, model, symmetry, wild=1.0, steps=40, at=20):
    """Weights after some steps on one regression, the gradient at step ``at`` multiplied by ``wild``; last loss."""
    generator = torch.Generator().manual_seed(0)
    state = rule.init(params, symmetry)

    def loss(params, x):
        return nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), x.square().sum(1, keepdim=True))

    for step in range(steps):
        x = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        grads = torch.func.grad(loss)(params, x)
        if step == at:
            grads = {n: wild * g for n, g in grads.items()}
        updates, state = rule(params, grads, state, symmetry, total_steps=steps)
        params = {n: p + updates[n] for n, p in params.items()}
    return params, float(loss(params, torch.randn(500, 4, generator=generator, dtype=torch.float64)))


def network():
    torch.manual_seed(0)
    model = mlp([4, 16, 16, 1], "relu").double()
    return model, {n: p.detach().clone() for n, p in model.named_parameters()}, infer(model)


def history(params, symmetry, steps=4):
    rule, generator = WhitenedPolar(), torch.Generator().manual_seed(1)
    state, mean = rule.init(params, symmetry), dict.fromkeys(params, 0.0)
    for _ in range(steps):
        grads = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
        mean = {n: 0.99 * mean[n] + 0.01 * g.square() for n, g in grads.items()}
        _, state = rule(params, grads, state, symmetry)
    return rule, state, {n: m / (1 - 0.99**steps) for n, m in mean.items()}


def usual_size(mean, symmetry_names):
    """RMS of a matrix with its bias."""
    return torch.cat([mean[n].flatten() for n in symmetry_names]).mean().sqrt()


@pytest.mark.parametrize("wild", [1.0, 30.0, 1e12])
def test_a_step_is_that_of_gradients_at_most_four_times_as_large_as_before(wild):
    torch.manual_seed(0)
    model = mlp([6, 16, 16, 5], "tanh").double()  # no frame
    params, symmetry = {n: p.detach() for n, p in model.named_parameters()}, infer(model)
    rule, state, mean = history(params, symmetry)
    grads = {n: wild * torch.ones_like(p) for n, p in params.items()}
    clipped = {}
    for layer in ("0", "2", "4"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        factor = min(1.0, float(4 * usual_size(mean, names) / wild))
        clipped |= {n: grads[n] * factor for n in names}
    updates, after = rule(params, grads, state, symmetry)
    wanted, wanted_after = rule(params, clipped, state, symmetry)
    torch.testing.assert_close(updates, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(after, wanted_after, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wild", [1e2, 1e8])
def test_a_transformed_network_follows_a_wild_gradient_transformed(wild, monkeypatch):
    model, params, symmetry = network()
    g = symmetry.sample(torch.Generator().manual_seed(2), scale_range=(1e-2, 1e2))
    here, _ = trained(WhitenedPolar(), params, model, symmetry, wild)
    there, _ = trained(WhitenedPolar(), symmetry.act(g, params), model, symmetry, wild)
    back = symmetry.act(symmetry.invert(g), there)
    for n, p in here.items():
        torch.testing.assert_close(back[n], p, rtol=1e-7, atol=1e-9)
    monkeypatch.setattr(whitened_polar, "CLIP_FACTOR", 1e30)
    plain, _ = trained(WhitenedPolar(), params, model, symmetry, wild)
    assert any((plain[n] - here[n]).abs().max() > 0.01 for n in here), "nothing was clipped"


def test_a_run_survives_a_wild_gradient(monkeypatch):
    model, params, symmetry = network()

    def last_loss(wild):
        return trained(WhitenedPolar(), params, model, symmetry, wild, steps=300, at=150)[1]

    calm = last_loss(1.0)
    assert last_loss(1e10) < 4 * calm
    monkeypatch.setattr(whitened_polar, "CLIP_FACTOR", 1e30)
    assert last_loss(1e10) > 10 * calm


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-24, 1e-10, 1e15])
def test_gradients_whose_squares_leave_float32_leave_it_finite(size):
    model = mlp([4, 8, 8, 3], "relu")
    params, symmetry = {k: p.detach() for k, p in model.named_parameters()}, infer(model)
    rule = WhitenedPolar()
    state, g = rule.init(params, symmetry), torch.Generator().manual_seed(0)
    for _ in range(35):
        grads = {k: size * torch.randn(p.shape, generator=g) for k, p in params.items()}
        updates, state = rule(params, grads, state, symmetry, total_steps=80)
        assert all(x.isfinite().all() for x in updates.values())
        assert max(float(x.abs().max()) for x in updates.values()) < 1
    assert all(x.isfinite().all() for slots in state.values() for x in slots.values())
