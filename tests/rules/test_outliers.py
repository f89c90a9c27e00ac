"""One wild gradient among ordinary ones: shortened, in a way that the network's symmetry cannot change."""

import pytest
import torch
from torch import nn

from learned_opt.features import mean_square
from learned_opt.rules.nominal import OUTLIER, DecayingPolar, Nominal, moderation
from learned_opt.rules.paced import Paced
from tasks.mlp import mlp
from tests.inferred import infer
from tests.states import accumulated


class Unmoderated(Paced):
    moderate = False


def trained(rule, params, model, symmetry, wild=1.0, steps=40, at=20):
    """Weights after some steps on one regression, the gradient at step ``at`` multiplied by ``wild``; last loss."""
    generator = torch.Generator().manual_seed(0)
    state = rule.init(params)

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


def history(params, steps=2):  # after the third step roots that no step has taken would stay zero
    state, generator = Nominal().init(params), torch.Generator().manual_seed(1)
    for _ in range(steps):
        state = accumulated(
            {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}, state
        )
    return state


@pytest.mark.parametrize("wild", [1.0, 30.0, 1e12])
def test_a_step_is_that_of_gradients_at_most_four_times_as_large_as_before(wild):
    _, params, symmetry = network()
    state = history(params)
    grads = {n: wild * torch.ones_like(p) for n, p in params.items()}
    usual = {n: (state[n]["v"].mean() / (1 - 0.99**2)).sqrt() for n in params}
    expected = {n: g * min(1.0, float(4 * usual[n] / wild)) for n, g in grads.items()}
    rule = Nominal(frame=False)
    updates, after = rule(params, grads, state, symmetry)
    rule.moderate = False
    wanted, wanted_after = rule(params, expected, state, symmetry)
    for n in params:
        torch.testing.assert_close(updates[n], wanted[n], rtol=1e-10, atol=1e-12)  # some entries cancel
        for k, x in wanted_after[n].items():
            torch.testing.assert_close(after[n][k], x, rtol=1e-10, atol=0)


@pytest.mark.parametrize("wild", [1e2, 1e8])
def test_a_transformed_network_follows_a_wild_gradient_transformed(wild):
    model, params, symmetry = network()
    g = symmetry.sample(torch.Generator().manual_seed(2), scale_range=(1e-2, 1e2))
    here, _ = trained(Paced(), params, model, symmetry, wild)
    there, _ = trained(Paced(), symmetry.act(g, params), model, symmetry, wild)
    back = symmetry.act(symmetry.invert(g), there)
    for n, p in here.items():
        torch.testing.assert_close(back[n], p, rtol=1e-7, atol=1e-9)
    plain, _ = trained(Unmoderated(), params, model, symmetry, wild)
    assert any((plain[n] - here[n]).abs().max() > 0.01 for n in here), "nothing was shortened"


def test_a_run_survives_a_wild_gradient():
    model, params, symmetry = network()
    losses = {
        (rule, wild): trained(rule(), params, model, symmetry, wild, steps=300, at=150)[1]
        for rule, wild in ((Paced, 1.0), (Paced, 1e10), (Unmoderated, 1e10))
    }
    assert losses[Paced, 1e10] < 4 * losses[Paced, 1.0]
    assert losses[Unmoderated, 1e10] > 30 * losses[Paced, 1.0]


def test_a_matrix_without_history_keeps_its_gradient():
    for step in (0.0, 7.0):
        assert moderation(torch.tensor([17.0]), torch.zeros(1), torch.tensor([step])).item() == 1


def test_a_gradient_of_zero_stays_zero_and_one_too_large_to_square_is_left_out():
    step = torch.full((1, 1, 1), 500.0)
    for g in (torch.zeros(1, 2, 2), torch.full((1, 2, 2), 1e30)):
        shortened = g * moderation(mean_square(g), torch.ones(1, 1, 1), step)
        assert shortened.isfinite().all() and shortened.abs().max() <= OUTLIER
    g = torch.zeros(1, 2, 2, requires_grad=True)
    (g * moderation(mean_square(g), torch.zeros(1, 1, 1), step)).sum().backward()
    assert g.grad is not None and g.grad.isfinite().all()


def test_the_opponent_polar_shortens_nothing():
    _, params, symmetry = network()
    state = history(params)
    grads = {n: 1e3 * torch.ones_like(p) for n, p in params.items()}
    _, after = DecayingPolar()(params, grads, state, symmetry)
    for n, s in after.items():
        torch.testing.assert_close(s["m"], 0.9 * state[n]["m"] + 0.1 * grads[n])
