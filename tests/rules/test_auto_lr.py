"""The rate that a run measures."""

import math

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt
from learned_opt.rules import auto_lr
from learned_opt.rules.auto_lr import START
from learned_opt.rules.whitened_polar import WhitenedPolar
from learned_opt.symmetry import independent
from tasks.mlp import mlp
from tests.inferred import infer


def trained(n, lr=1.0, total=400):
    """The log rate after every step of a regression."""
    torch.manual_seed(0)
    model = mlp([4, 16, 16, 3], "relu").double()
    symmetry, rule = infer(model), WhitenedPolar()
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    state, found = rule.init(params, symmetry), []
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def loss(params, x):
        return nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), torch.tanh(x @ teacher))

    for _ in range(n):
        x = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        grads = torch.func.grad(loss)(params, x)
        updates, state = rule(params, grads, state, symmetry, total_steps=total)
        params = {k: p + lr * updates[k] for k, p in params.items()}
        found.append(START + float(state["network"]["log_lr"]))
    return found


@pytest.mark.parametrize("total, end", [(None, 50), (1000, 50), (160, 20), (8, 10)])
def test_it_measures_an_eighth_of_the_run_ten_to_fifty_steps(total, end):
    rates = trained(55, total=total)
    assert len(set(rates[:end])) == end and len(set(rates[end - 1 :])) == 1
    assert all(-1 <= r <= 1 for r in rates)


def test_it_corrects_a_wrong_rate():
    """Rates a factor 100 apart come nearer than a fifth of that (14 is the least that they can)."""
    slow, fast = (trained(50, lr)[-1] for lr in (0.1, 10.0))
    assert slow > 0.5 > -0.5 > fast
    assert 1 < 100 * math.exp(fast - slow) < 20


def driven(gradients, n, total=None):
    """Sizes of steps of a tanh network by given gradients, at weights that stay where they are, and the last state."""
    model = mlp([4, 12, 12, 3], "tanh").double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    symmetry, rule = infer(model), WhitenedPolar()
    state, sizes, g = rule.init(params, symmetry), [], torch.Generator().manual_seed(0)
    first = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in params.items()}
    for t in range(1, n + 1):
        fresh = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in params.items()}
        grads = gradients(t, first, fresh)
        updates, state = rule(params, grads, state, symmetry, total_steps=total, weight_decay=0.0)
        sizes.append(float(updates["2.weight"].norm()))
    return sizes, state


KINDS = {
    "independent": (lambda t, first, fresh: fresh, 0.5),
    "the same": (lambda t, first, fresh: first, 1.0),
    "alternating": (lambda t, first, fresh: {k: (-1) ** t * x for k, x in first.items()}, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_independent_gradients_halve_the_rate_and_no_others_do(kind):
    gradients, factor = KINDS[kind]
    sizes, _ = driven(gradients, 170)
    decay = math.sqrt((100 + 139) / (100 + 159))  # of the schedule without a horizon, by 20 steps
    # means of 20: single polar factors of random momenta differ in size
    assert sum(sizes[150:]) / sum(sizes[130:150]) == pytest.approx(factor * decay, rel=0.03)


def test_gradients_of_zero_measure_nothing_and_move_nothing():
    sizes, state = driven(lambda t, first, fresh: {k: 0 * x for k, x in first.items()}, 30, total=80)
    assert not any(sizes)
    assert state["network"]["correlation"] == 0 and state["network"]["slope"] == 0


def test_what_it_measures_does_not_depend_on_the_scale_of_hidden_units():
    """Of a network and of the same function in other weights, over a whole run."""
    model = mlp([6, 12, 12, 5], "relu").double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    symmetry, rule = infer(model), WhitenedPolar()
    generator = torch.Generator().manual_seed(3)
    element = symmetry.sample(generator, scale_range=(0.1, 10.0), dtype=torch.float64)
    moved, state, other = symmetry.act(element, params), rule.init(params, symmetry), rule.init(params, symmetry)
    for _ in range(32):
        grads = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}
        _, state = rule(params, grads, state, symmetry, total_steps=80)
        _, other = rule(moved, symmetry.act(element, grads, dual=True), other, symmetry, total_steps=80)
    for key in ("slope", "log_lr", "correlation", "lr_scale"):
        assert float(state["network"][key]) != 0
        torch.testing.assert_close(other["network"][key], state["network"][key], rtol=1e-9, atol=1e-12)


def test_tensors_of_one_shape_keep_ages_of_their_own():
    """What a tensor is told of its age does not depend on which others of its shape step with it."""
    g = torch.Generator().manual_seed(0)
    shapes = {"old": (6, 5), "young": (6, 5), "old bias": (6,), "young bias": (6,)}
    params = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    rule, symmetry = WhitenedPolar(measure_lr=False), independent(params)
    state = rule.init(params, symmetry)

    def step(names, state):
        grads = {n: torch.randn(shapes[n], generator=g, dtype=torch.float64) for n in names}
        return grads, *rule(params, grads, state, symmetry)

    for _ in range(5):
        state = step(["old", "old bias"], state)[2]
    for _ in range(2):  # at the second also what counts as far too large is known
        grads, together, after = step(list(shapes), state)
        young = {n: grads[n] for n in ("young", "young bias")}
        alone, _ = rule(params, young, state, symmetry)
        torch.testing.assert_close({n: together[n] for n in young}, alone)
        state = after


def test_a_tensor_that_joins_late_takes_the_networks_rate():
    """The head is frozen for the warm-up; its first steps are as large as those of a network that has always had it."""
    torch.manual_seed(0)
    model = mlp([4, 16, 16, 6], "relu")
    optimizer = NFNOpt(model, symmetry=infer(model), total_steps=100)
    clocks = []
    for t in range(20):
        for n, p in model.named_parameters():
            p.requires_grad_(t >= 15 or not n.startswith("4."))
            p.grad = torch.randn_like(p) if p.requires_grad else None
        before = model[4].weight.detach().clone()
        optimizer.step()
        clocks.append(float((model[4].weight - before).norm()))
    assert not any(clocks[:15]) and min(clocks[15:]) > 0.5 * max(clocks[15:])
    assert optimizer.state[model[4].weight]["step"] == 5 and optimizer.state[model[0].weight]["step"] == 20


@pytest.mark.parametrize(("cosine", "low", "high"), [(0.03, 0.0, 0.85), (0.5, 0.95, 1.05)])
def test_a_short_run_trusts_strong_evidence_alone(cosine, low, high):
    def gained(total_steps, steps=25):
        zero = torch.zeros((), dtype=torch.float64)
        measured = auto_lr.Measured(zero, zero, zero, zero)
        for t in range(2, steps + 1):
            slope = torch.lerp(measured.slope, zero + cosine, 1 - auto_lr.AVERAGE)
            log_lr = auto_lr.log_lr(measured, slope, zero + t, total_steps)
            measured = measured._replace(slope=slope, log_lr=log_lr)
        return float(measured.log_lr)

    assert low < gained(200) / gained(800) < high
