"""The paced rule: nominal steps times a rate, which is the one that its equations give."""

import math

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt
from learned_opt.rules.nominal import RATE, Nominal, decay, schedule
from learned_opt.rules.paced import START, Paced, calm
from learned_opt.symmetry import independent
from tasks.mlp import mlp
from tests.inferred import infer


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for _ in range(n):
        x = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        yield x, torch.tanh(x @ teacher)


def trained(n, lr=1.0, total=400, activation="relu"):
    """Log rate and loss after every step, and the model's weights, gradients and updates at every step."""
    torch.manual_seed(0)
    model = mlp([4, 16, 16, 3], activation).double()
    symmetry, rule = infer(model), Paced()
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    state, rows = rule.init(params), []
    for x, y in batches(n):
        leaves = {k: p.requires_grad_() for k, p in params.items()}
        loss = nn.functional.mse_loss(torch.func.functional_call(model, leaves, (x,)), y)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        with torch.no_grad():
            updates, after = rule(params, grads, state, symmetry, total_steps=total)
            rows.append({"params": params, "grads": grads, "updates": updates, "before": state, "loss": float(loss)})
            params = {k: (p + lr * updates[k]).detach() for k, p in params.items()}
        state = after
        rows[-1]["log_rate"] = START + float(state["0.bias"]["gained"])
    return symmetry, rows


def test_the_log_rate_is_its_equation():
    """Without hidden scales (tanh) the frame is the identity, and the cosine that of the plain tensors."""
    _, rows = trained(60, activation="tanh")
    rho, mean = -1.0, 0.0
    for t, (last, row) in enumerate(zip([None, *rows], rows, strict=False), start=1):
        cosine = 0.0
        if last is not None:
            pairs = [(row["grads"][k], -last["updates"][k]) for k in row["grads"]]
            cosine = sum((g * d).sum() for g, d in pairs) / sum(g.norm() * d.norm() for g, d in pairs)
            mean = 0.8 * mean + 0.2 * float(cosine)
            if t <= 50:
                rho += 0.3 / (1 + t / 50) * (math.tanh(mean / (1 - 0.8 ** (t - 1)) / 0.03) - rho)
        assert row["log_rate"] == pytest.approx(rho, abs=1e-9)
    assert rho > -0.9


class Remembering(Nominal):
    """The nominal rule with another decay rate of its momentum."""

    def __init__(self, rate):
        super().__init__()
        self.decay = rate

    def memory(self, state):
        return self.decay


def test_the_step_is_the_nominal_one_at_that_rate_and_memory():
    symmetry, rows = trained(60, lr=12.0)
    for t in (1, 7, 50, 51, 60):
        row = rows[t - 1]
        slope = float(row["before"]["0.bias"]["slope"])
        assert t < 50 or slope < 0  # so that the test sees it
        memory = 0.9 + 0.07 * min(1, max(0, -slope / 0.28)) if t > 50 else 0.9
        nominal, _ = Remembering(memory)(row["params"], row["grads"], row["before"], symmetry, total_steps=400)
        clock = torch.tensor(float(t), dtype=torch.float64)
        rate = math.exp(row["log_rate"]) * (1.2 * schedule(clock, 400) if t > 50 else decay(clock, 400))
        for k, u in row["updates"].items():
            torch.testing.assert_close(u, nominal[k] * rate / schedule(clock, 400), rtol=1e-9, atol=1e-14)
    assert RATE == 0.01


@pytest.mark.parametrize("total, end", [(None, 50), (1000, 50), (160, 20), (8, 10)])
def test_it_measures_an_eighth_of_the_run_ten_to_fifty_steps(total, end):
    _, rows = trained(55, total=total)
    rates = [r["log_rate"] for r in rows]
    assert len(set(rates[:end])) == end and len(set(rates[end - 1 :])) == 1
    assert all(-1 <= r <= 1 for r in rates)


def test_it_corrects_a_wrong_rate():
    """Rates a factor 100 apart come nearer than a fifth of that (14 is the least that they can)."""
    slow, fast = (trained(50, lr)[1][-1]["log_rate"] for lr in (0.1, 10.0))
    assert slow > 0.5 > -0.5 > fast
    assert 1 < 100 * math.exp(fast - slow) < 20


def test_a_tensor_that_joins_late_takes_the_networks_rate():
    torch.manual_seed(0)
    model = mlp([4, 16, 16, 3], "relu").double()
    symmetry, rule = infer(model), Paced()
    params = {k: p.detach() for k, p in model.named_parameters()}
    late = {"4.weight", "4.bias"}
    state = rule.init({k: p for k, p in params.items() if k not in late})
    for t in range(8):
        if t == 7:
            state |= rule.init({k: params[k] for k in late})
        _, state = rule(params, {k: torch.randn_like(params[k]) for k in state}, state, symmetry)
    assert float(state["4.bias"]["gained"]) != 0
    assert len({float(s["gained"]) for s in state.values()}) == 1


def test_tensors_that_join_do_not_change_what_the_others_have_measured():
    model = mlp([4, 16, 16, 3], "relu").double()
    symmetry, rule, slopes = infer(model), Paced(), []
    params = {k: p.detach() for k, p in model.named_parameters()}
    late = {k: params[k] for k in ("4.weight", "4.bias")}
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        state = rule.init({k: p for k, p in params.items() if k not in late})
        for _ in range(8):
            grads = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in params.items()}
            before = state
            _, state = rule(params, {k: grads[k] for k in state}, state, symmetry)
        _, joined = rule(params, grads, before | rule.init(late), symmetry)
        for key in ("slope", "gained"):
            torch.testing.assert_close(joined["0.bias"][key], state["0.bias"][key])
        slopes.append(float(before["0.bias"]["slope"]))
    assert min(slopes) < 0 < max(slopes)


def test_a_tensor_that_sits_out_has_not_moved():
    model = mlp([4, 16, 3], "relu").double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    rule, symmetry, grads = Paced(), infer(model), {k: torch.ones_like(p) for k, p in params.items()}
    _, state = rule(params, grads, rule.init(params), symmetry)
    assert all(s["moved"].any() for s in state.values())
    updates, state = rule(params, {k: g for k, g in grads.items() if k != "2.weight"}, state, symmetry)
    assert not state["2.weight"]["moved"].any()
    assert all(torch.equal(state[k]["moved"], u) for k, u in updates.items())


def test_tensors_of_one_shape_keep_ages_of_their_own():
    """What a tensor is told of its age does not depend on which others of its shape step with it."""
    g = torch.Generator().manual_seed(0)
    shapes = {"old": (6, 5), "young": (6, 5), "old bias": (6,), "young bias": (6,)}
    params = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    rule, symmetry, state = Nominal(), independent(params), Nominal().init(params)

    def step(names, state):
        grads = {n: torch.randn(shapes[n], generator=g, dtype=torch.float64) for n in names}
        return grads, *rule(params, grads, state, symmetry)

    for _ in range(5):
        state = step(["old", "old bias"], state)[2]
    for _ in range(2):  # at the second also what counts as an outlier is known
        grads, together, after = step(list(shapes), state)
        young = {n: grads[n] for n in ("young", "young bias")}
        alone, _ = rule(params, young, state, symmetry)
        torch.testing.assert_close({n: together[n] for n in young}, alone)
        state = after
    assert {n: int(s["step"]) for n, s in state.items()} == {"old": 7, "young": 2, "old bias": 7, "young bias": 2}


def test_a_frozen_network_and_zero_gradients_leave_it_finite():
    model = mlp([4, 8, 3], "relu")
    optimizer = NFNOpt(model.named_parameters(), symmetry=infer(model), rule="paced", total_steps=20)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    assert all(s.isfinite().all() for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s))


def driven(gradients, n, total=None):
    """What paced steps of a tanh network make of given gradients, at weights that stay where they are."""
    model = mlp([4, 12, 12, 3], "tanh").double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    symmetry, rule = infer(model), Paced()
    state, rows, g = rule.init(params), [], torch.Generator().manual_seed(0)
    first = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in params.items()}
    for t in range(1, n + 1):
        fresh = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in params.items()}
        grads = gradients(t, first, fresh)
        updates, after = rule(params, grads, state, symmetry, total_steps=total)
        rows.append({"params": params, "grads": grads, "updates": updates, "before": state, "after": after})
        state = after
    return symmetry, rows


@pytest.mark.parametrize("total, beginning", [(80, 10), (None, 50)])
def test_the_agreement_is_the_mean_of_its_equation_from_twice_to_thrice_the_beginning(total, beginning):
    _, rows = driven(lambda t, first, fresh: fresh, 3 * beginning + 4, total)
    found, memories = [], set()
    for t, row in enumerate(rows, start=1):
        state, slope = row["after"], float(row["before"]["0.bias"]["slope"])
        if 2 * beginning < t <= 3 * beginning:
            memory = 0.9 + 0.07 * min(1, max(0, -slope / 0.28)) if t > 50 else 0.9
            m = sum(s["m"].square().sum() for s in state.values())
            v = sum((s["v"] / (1 - 0.99**t)).sum() for s in state.values())
            found.append(float(m / v * (1 + memory) / (1 - memory)))
            memories.add(memory)
        mean = sum(found) / len(found) if found else 0.0
        assert float(state["0.bias"]["agreed"]) == pytest.approx(mean, rel=1e-9)
    assert len(found) == beginning and (total or len(memories) > 1)


KINDS = {
    "independent": (lambda t, first, fresh: fresh, 0.5),
    "the same": (lambda t, first, fresh: first, 1.0),
    "alternating": (lambda t, first, fresh: {k: (-1) ** t * x for k, x in first.items()}, 1.0),
    "none": (lambda t, first, fresh: {k: 0 * x for k, x in first.items()}, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_independent_gradients_halve_the_rate_and_no_others_do(kind):
    gradients, factor = KINDS[kind]
    symmetry, rows = driven(gradients, 160)
    for t in (100, 125, 151, 160):
        row = rows[t - 1]
        memory = 0.9 + 0.07 * min(1, max(0, -float(row["before"]["0.bias"]["slope"]) / 0.28))
        nominal, _ = Remembering(memory)(row["params"], row["grads"], row["before"], symmetry)
        ratio = 1.2 * math.exp(START + float(row["after"]["0.bias"]["gained"])) * (factor if t > 150 else 1)
        for k, u in row["updates"].items():
            torch.testing.assert_close(u, nominal[k] * ratio, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "agreed, factor", [(0, 1), (0.6, 1), (0.7, 0.5**0.5), (0.8, 0.5), (1.2, 0.5), (1.3, 0.5**0.5), (1.4, 1), (9, 1)]
)
def test_the_rate_is_halved_where_the_agreement_is_near_one(agreed, factor):
    assert float(calm(torch.tensor(float(agreed)))) == pytest.approx(factor, rel=1e-5)


def test_what_it_measures_does_not_depend_on_the_scale_of_hidden_units():
    """Both means, over a whole run, of a network and of the same function in other weights."""
    model = mlp([4, 12, 12, 3], "relu").double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    symmetry, rule = infer(model), Paced()
    generator = torch.Generator().manual_seed(3)
    element = symmetry.sample(generator, scale_range=(0.1, 10.0), dtype=torch.float64)
    moved, state, other = symmetry.act(element, params), rule.init(params), rule.init(params)
    for _ in range(32):
        grads = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}
        _, state = rule(params, grads, state, symmetry, total_steps=80)
        _, other = rule(moved, symmetry.act(element, grads, dual=True), other, symmetry, total_steps=80)
    for key in Paced.shared:
        assert float(state["0.bias"][key]) != 0
        torch.testing.assert_close(other["0.bias"][key], state["0.bias"][key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-30, 5e18])
def test_gradients_whose_squares_leave_float32_leave_it_finite(size):
    model = mlp([4, 8, 3], "relu")
    params = {k: p.detach() for k, p in model.named_parameters()}
    rule, symmetry = Paced(), infer(model)
    state = rule.init(params)
    for _ in range(32):
        grads = {k: size * torch.randn_like(p) for k, p in params.items()}
        updates, state = rule(params, grads, state, symmetry, total_steps=80)
    assert all(x.isfinite().all() for x in updates.values())
    assert float(state["0.bias"]["agreed"]) == 0
