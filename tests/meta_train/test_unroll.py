import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call

from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.task import TaskError


class LearnedSGD(UpdateRule):
    """Momentum with a learned log-rate and momentum, decaying to the horizon."""

    def __init__(self, rate=0.1, dtype=torch.float64):
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(rate, dtype=dtype).log())
        self.momentum = nn.Parameter(torch.tensor([0.5], dtype=dtype))

    def init(self, params, symmetry):
        state = {n: {"m": torch.zeros_like(p)} for n, p in params.items()}
        return state | {"": {"step": torch.zeros((), dtype=next(iter(params.values())).dtype)}}

    def forward(self, params, grads, state, symmetry, *, total_steps=None, **options):
        step = state[""]["step"]
        decay = 1 - 0.9 * step / total_steps
        moments = {n: self.momentum * state[n]["m"] + g for n, g in grads.items()}
        updates = {n: -self.log_rate.exp() * decay * m for n, m in moments.items()}
        return updates, {n: {"m": m} for n, m in moments.items()} | {"": {"step": step + 1}}


class Regression:
    """A small tanh network on noisy data: nothing about it is linear."""

    name = "regression"
    steps = 10
    ceiling = 2.0

    def __init__(self, dtype=torch.float64):
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
        self.dtype = dtype

    def init(self, generator):
        return {
            n: torch.randn(p.shape, generator=generator, dtype=self.dtype) for n, p in self.model.named_parameters()
        }

    def batches(self, generator, n):
        x = torch.randn(n, 8, 3, generator=generator, dtype=self.dtype)
        return x, x.prod(-1, keepdim=True)

    def batch(self, generator):
        return tuple(b[0] for b in self.batches(generator, 1))

    def held_out(self):
        return self.batch(torch.Generator().manual_seed(99))

    def loss(self, params, batch):
        x, y = batch
        return (functional_call(self.model, params, (x,)) - y).square().mean()


class Deterministic(Regression):
    """Every run is the same: constant initial weights and data."""

    def init(self, generator):
        return {n: torch.full(p.shape, 0.3, dtype=self.dtype).cumsum(0) for n, p in self.model.named_parameters()}

    def batches(self, generator, n):
        x = torch.linspace(-1, 1, 24, dtype=self.dtype).view(1, 8, 3).expand(n, 8, 3)
        return x, x.prod(-1, keepdim=True)


class Deep(Deterministic):
    """With a matrix that is not thin."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
        self.model = nn.Sequential(*layers).double()

    def init(self, generator):
        return Regression.init(self, seeded(5))


def make(task=None, rule=None, **options):
    task, rule = task or Regression(), rule or LearnedSGD()
    return Unroll(task, rule, None, **({"horizon": (10, 10), "clip": 1e6} | options))


def theta_of(unroll, grad=False):
    return {n: p.detach().clone().requires_grad_(grad) for n, p in unroll.rule.named_parameters()}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def naive_losses(unroll, theta, seed, steps, detach):
    """One particle, written as one would at first."""
    generator = seeded(seed)
    params = {n: p for n, p in unroll.init(1, generator)["params"].items()}
    params = {n: p[0].requires_grad_() for n, p in params.items()}
    state = unroll.rule.init(params, unroll.symmetry)
    data = []
    for start in range(0, steps, 8):
        data += list(zip(*unroll.task.batches(generator, min(8, steps - start)), strict=True))
    losses = []
    for batch in data:
        loss = unroll.task.loss(params, batch)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        grads = [g.detach() if detach else g for g in grads]
        updates, state = functional_call(
            unroll.rule,
            theta,
            (params, dict(zip(params, grads, strict=True)), state, unroll.symmetry),
            {"total_steps": torch.tensor(float(unroll.horizon[1]), dtype=torch.float64)},
        )
        params = {n: p + updates[n] for n, p in params.items()}
        losses.append(loss / unroll.task.ceiling)
    return torch.stack(losses)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_meta_gradient_is_that_of_the_naive_loop(detach, remat):
    unroll = make()
    theta = theta_of(unroll, grad=True)
    naive = naive_losses(unroll, theta, 3, 10, detach)
    expected = torch.autograd.grad(naive.mean(), list(theta.values()))

    generator = seeded(3)
    _, trace = unroll(theta, unroll.init(1, generator), 10, generator, detach=detach, remat=remat)
    actual = torch.autograd.grad(trace.loss.mean(), list(theta.values()))
    torch.testing.assert_close(trace.loss[:, 0], naive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    if detach:  # the switch does something
        theta2 = theta_of(unroll, grad=True)
        second = naive_losses(unroll, theta2, 3, 10, False).mean()
        other = torch.autograd.grad(second, list(theta2.values()))
        assert (other[0] - actual[0]).abs() > 1e-4 * other[0].abs()


def test_many_particles_equal_one_by_one():
    unroll = make(Deterministic(), horizon=(12, 12))
    generator = seeded(0)
    particles = unroll.init(3, generator)
    offsets = torch.randn(3, 1, 1, generator=generator, dtype=torch.float64)
    particles["params"]["0.weight"] = particles["params"]["0.weight"] + offsets
    own = {n: torch.stack([t, 0.5 * t, 0.1 * t]) for n, t in theta_of(unroll).items()}
    with torch.no_grad():
        after, trace = unroll(own, particles, 9, generator, batched=True)
        for i in range(3):
            alone = {k: v[i : i + 1] for k, v in particles.items() if isinstance(v, torch.Tensor)}
            for kind in ("params",):
                alone[kind] = {n: p[i : i + 1] for n, p in particles[kind].items()}
            alone["state"] = {n: {k: v[i : i + 1] for k, v in s.items()} for n, s in particles["state"].items()}
            mine = {n: t[i] for n, t in own.items()}
            after_i, trace_i = unroll(mine, alone, 9, generator)
            torch.testing.assert_close(trace.loss[:, i : i + 1], trace_i.loss)
            for n, p in after_i["params"].items():
                torch.testing.assert_close(after["params"][n][i : i + 1], p)
    assert trace.loss.std(1).min() > 1e-3


def test_unequal_horizons_in_one_batch_equal_separate_runs():
    horizons = [3, 5, 11]
    unroll = make(Deterministic(), horizon=(3, 11))
    theta = theta_of(unroll)

    def run(chosen, steps):
        task = dataclasses.replace(unroll)
        queue = list(chosen)
        # each reset of particle i draws its own horizon again
        object.__setattr__(task, "_horizons", lambda count, generator: torch.tensor(queue[:count]))
        particles = task.init(len(chosen), seeded(0))
        losses = []
        with torch.no_grad():
            for _ in range(steps):
                particles["horizon"] = particles["stop"] = torch.tensor(chosen)
                particles, trace = task(theta, particles, 1, seeded(1))
                losses.append(trace.loss[0])
        return torch.stack(losses)

    together = run(horizons, 22)
    for i, horizon in enumerate(horizons):
        torch.testing.assert_close(together[:, i], run([horizon], 22)[:, 0])
        episodes = together[: 2 * horizon, i].view(2, horizon)
        torch.testing.assert_close(episodes[0], episodes[1])
        assert episodes[0, -1] != episodes[0, 0]
    # The rule was told the horizon: equal starts, different courses.
    assert not torch.allclose(together[:3, 0], together[:3, 2])


@pytest.mark.parametrize("remat", [True, False])
def test_runs_in_phase_are_what_they_are_beside_others(remat):
    """A rule that is told the ages of all runs does for each what is due for it."""
    task = Deep()
    rule = RULES["learned"]().double()
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=seeded(1), dtype=p.dtype))
    unroll = Unroll(task, rule, symmetry_of(task), (40, 40), clip=1e6)
    theta = theta_of(unroll, grad=True)
    particles = unroll.init(2, seeded(0))
    late, _ = unroll(theta, unroll.init(1, seeded(0)), 4, seeded(0))
    mixed = joined(particles, late)
    _, alone = unroll(theta, particles, 22, seeded(1), remat=remat)
    _, beside = unroll(theta, mixed, 22, seeded(1), remat=remat)
    torch.testing.assert_close(beside.loss[:, :2], alone.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(beside.loss[:18, 2], alone.loss[4:, 0], rtol=1e-9, atol=1e-12)
    ours, theirs = (torch.autograd.grad(t.loss[:, 0].mean(), list(theta.values())) for t in (alone, beside))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert any(g.any() for g in ours)


def joined(a, b):
    if isinstance(a, dict):
        return {k: joined(a[k], b[k]) for k in a}
    return torch.cat([a, b])


def test_resets_inside_one_call_start_afresh():
    unroll = make(Deterministic(), horizon=(4, 4))
    generator = seeded(0)
    with torch.no_grad():
        after, trace = unroll(theta_of(unroll), unroll.init(2, generator), 10, generator)
    torch.testing.assert_close(trace.loss[:4], trace.loss[4:8])
    torch.testing.assert_close(trace.loss[:2], trace.loss[8:])
    assert trace.segment[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert after["step"].tolist() == [2, 2]


def test_copies_share_weights_data_and_horizon():
    unroll = make(horizon=(3, 9))
    generator = seeded(0)
    particles = unroll.init(6, generator, copies=2, spread=True)
    with torch.no_grad():
        after, trace = unroll(theta_of(unroll), particles, 20, generator, copies=2)
    plus, minus = trace.loss.chunk(2, 1)
    assert torch.equal(plus, minus)
    assert torch.equal(after["horizon"][:3], after["horizon"][3:])
    assert (plus.std(1) > 0).all(), "the pairs differ from each other"
    assert trace.segment.max() >= 2


def test_spread_desynchronises_but_tells_the_full_horizon():
    unroll = make(horizon=(100, 100))
    particles = unroll.init(50, seeded(0), spread=True)
    assert (particles["horizon"] == 100).all()
    assert 40 < particles["stop"].double().mean() < 60
    assert (particles["stop"] >= 1).all()


def test_runs_end_on_the_grid():
    unroll = dataclasses.replace(make(horizon=(4, 99)), grid=10)
    particles = unroll.init(100, seeded(0), spread=True)
    for ends in (particles["horizon"], particles["stop"]):
        assert ((ends % 10 == 0) | (ends < 10)).all() and (ends >= 1).all()
    assert (particles["horizon"] < 10).any() and len(set(particles["horizon"].tolist())) > 10


def test_without_resets_runs_go_on():
    unroll, generator = make(horizon=(4, 4)), seeded(0)
    with torch.no_grad():
        after, trace = unroll(theta_of(unroll), unroll.init(2, generator), 10, generator, resets=False)
    assert after["step"].tolist() == [10, 10] and not trace.segment.any()


def test_rates_multiply_updates():
    unroll, particles = make(Deterministic(), horizon=(9, 9)), make(Deterministic(), horizon=(9, 9)).init(2, seeded(0))

    def steps(rates):
        with torch.no_grad():
            return unroll(theta_of(unroll), particles, len(rates), seeded(1), rates=rates)[0]["params"]

    start, whole, half, none = particles["params"], steps([1.0]), steps([0.5]), steps([0.0])
    for n, p in start.items():
        torch.testing.assert_close(half[n], (p + whole[n]) / 2)
        assert torch.equal(none[n], p) and not torch.equal(whole[n], p)


def test_weights_are_judged_on_fresh_batches():
    """The mean loss of each particle's weights over batches of its own."""
    unroll = make(horizon=(9, 9))
    params = unroll.init(3, seeded(0))["params"]
    found = unroll.judged(params, 2, seeded(1))
    drawn = unroll.task.batches(seeded(1), 6)
    for i in range(3):
        own = {n: p[i] for n, p in params.items()}
        losses = [unroll.task.loss(own, tuple(b.view(2, 3, *b.shape[1:])[k, i] for b in drawn)) for k in range(2)]
        torch.testing.assert_close(found[i], unroll._normalise(torch.stack(losses).mean()))


def test_horizons_are_log_uniform():
    unroll = make(horizon=(10, 999))
    horizon = unroll.init(400, seeded(0))["horizon"].double()
    assert horizon.min() >= 10 and horizon.max() <= 999
    assert 0.42 < (horizon < 100).double().mean() < 0.58


def test_weights_of_the_end_have_mean_one_over_a_run():
    unroll = make(end_weight=3.0)
    step, horizon = torch.arange(40), torch.tensor(40)
    weight = unroll._weight(step, horizon)
    assert abs(weight.mean() - 1) < 1e-3
    assert weight[20:].sum() > 0.9 * weight.sum()
    assert torch.equal(make()._weight(step, horizon), torch.ones(40))


def test_normalisation():
    loss = torch.tensor([1.0, 100.0, float("nan"), float("inf"), -float("inf"), 1e-9])
    clipped = make(clip=1.5)._normalise(loss)
    torch.testing.assert_close(clipped, torch.tensor([0.5, 1.5, 1.5, 1.5, 1.5, 5e-10]))
    logged = make(clip=1.5, transform="log", floor=1e-3)._normalise(loss)
    torch.testing.assert_close(logged, clipped.clamp(min=1e-3).log())


@pytest.mark.parametrize("measure", ["fresh", "held_out"])
def test_other_meta_batches(measure):
    unroll = make(measure=measure)
    theta = theta_of(unroll, grad=True)
    generator = seeded(0)
    particles = unroll.init(2, generator)
    _, trace = unroll(theta, particles, 6, generator)
    first = unroll.task.held_out()
    if measure == "fresh":
        generator = seeded(0)
        unroll.init(2, generator)
        unroll.task.batches(generator, 12)
        first = tuple(b[0] for b in unroll.task.batches(generator, 12))
    start = {n: p[0] for n, p in particles["params"].items()}
    torch.testing.assert_close(trace.raw[0, 0], unroll.task.loss(start, first))
    assert torch.autograd.grad(trace.loss.mean(), theta["log_rate"])[0] != 0


def test_diverged_runs_cost_the_clip_and_are_reset():
    unroll = make(horizon=(1000, 1000), clip=1.5)
    theta = theta_of(unroll)
    own = {n: torch.stack([t, t, t, t]) for n, t in theta.items()}
    own["log_rate"] = torch.tensor([-3.0, 400.0, -3.0, -3.0], dtype=torch.float64)
    generator = seeded(0)
    with torch.no_grad():
        after, trace = unroll(own, unroll.init(4, generator), 12, generator, batched=True)
        assert not trace.raw[-1, 1].isfinite() and trace.loss[-1, 1] == 1.5
        assert after["step"].tolist() == [12, 0, 12, 12]
        assert all(p.isfinite().all() for p in after["params"].values())
        # A pair (particles 1 and 3) is reset only when both have diverged.
        particles = unroll.init(4, generator, copies=2)
        after, trace = unroll(own, particles, 12, generator, copies=2, batched=True)
        assert after["step"].tolist() == [12, 12, 12, 12]
        own["log_rate"][3] = 400.0
        after, trace = unroll(own, particles, 12, generator, copies=2, batched=True)
        assert after["step"].tolist() == [12, 0, 12, 0]


def test_no_graph_without_gradients():
    unroll = make()
    generator = seeded(0)
    with torch.no_grad():
        after, trace = unroll(theta_of(unroll, grad=True), unroll.init(2, generator), 3, generator)
    assert not trace.loss.requires_grad
    assert not any(p.requires_grad for p in after["params"].values())


def test_copies_must_divide_particles():
    with pytest.raises(ValueError, match="multiple of 2"):
        make().init(3, seeded(0), copies=2)


def test_losses_that_are_not_positive_are_refused():
    unroll, lowered = make(), Regression()
    lowered.loss = lambda params, batch: Regression.loss(lowered, params, batch) - 100.0
    for measure in ("train", "fresh"):
        with torch.no_grad(), pytest.raises(TaskError, match="task 'regression' has a loss of -"):
            other = make(lowered, measure=measure)
            other(theta_of(unroll), other.init(2, seeded(0)), 3, seeded(0))
    lowered.ceiling = -2.0
    with pytest.raises(TaskError, match="its ceiling"):
        make(lowered)
