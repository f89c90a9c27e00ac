"""Evaluation: the measures on curves with known answers, the loop, the store, the command line."""

import contextlib
import copy
import dataclasses
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean
from torch import nn
from torch.func import functional_call

import learned_opt
from meta_train.__main__ import main
from meta_train.bench import curves as cv
from meta_train.bench import evaluate as ev
from meta_train.bench import optimizers as op
from meta_train.bench import report as rp
from meta_train.bench.curves import CAP, Curve
from meta_train.bench.evaluate import evaluate
from meta_train.bench.outcomes import HORIZON_CAP, HORIZONS, Outcome
from meta_train.bench.pictures import colours_of
from meta_train.bench.store import Job, Plan, PlannedOptimizer, PlannedTask, Store
from meta_train.bench.suites import task_fingerprint
from meta_train.errors import UnknownName, UsageError
from tasks.task import TaskError

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
ME = f"{Path(__file__).stem}:SUITE"  # the suite of this file, by name, as workers find it


# -------------------------------------------------------------------------------------- tiny tasks


class Quadratic:
    """Loss 1/2 sum_k a_k w_k^2 with noise on the gradient; SGD is stable up to lr = 2 / max(a)."""

    def __init__(self, name: str = "quadratic", noise: float = 0.0, steps: int = 40):
        self.name, self.noise, self.steps, self.ceiling = name, noise, steps, 10.0
        self.model = nn.Linear(3, 1, bias=False)
        self.curvature = torch.tensor([1.0, 0.5, 0.25])

    def init(self, generator):
        return {"weight": torch.randn(1, 3, generator=generator)}

    def batch(self, generator):
        return (self.noise * torch.randn(1, 3, generator=generator),)

    def train_eval(self):
        return (torch.zeros(1, 3),)

    held_out = train_eval

    def loss(self, params, batch):
        w = params["weight"]
        return (0.5 * self.curvature * w**2 + batch[0] * w).sum()


class Regression:
    """A small network with hidden matrices on fixed data."""

    name, steps, ceiling = "regression", 30, 4.0

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.x = torch.randn(96, 4, generator=torch.Generator().manual_seed(7))
        self.y = torch.sin(self.x[:, :2]) * self.x[:, 2:]

    def init(self, generator):
        return {
            name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
            for name, p in self.model.named_parameters()
        }

    def batch(self, generator):
        rows = torch.randint(64, (16,), generator=generator)
        return self.x[rows], self.y[rows]

    def train_eval(self):
        return self.x[:64], self.y[:64]

    def held_out(self):
        return self.x[64:], self.y[64:]

    def loss(self, params, batch):
        x, y = batch
        return (functional_call(self.model, params, (x,)) - y).square().mean()


class Lowered(Regression):
    """Its loss falls below zero, like that of densities."""

    def __init__(self, by=0.5, ceiling=4.0):
        super().__init__()
        self.by, self.ceiling = by, ceiling

    def loss(self, params, batch):
        return super().loss(params, batch) - self.by


SUITE = {
    "quadratic": Quadratic,
    "noisy": lambda: Quadratic("noisy", noise=0.3),
    "regression": Regression,
}
FAMILIES = {"drawn": lambda generator: Quadratic()}
LIST = [Quadratic]
GRIDS = {"adam": (1e-2, 1e-1), "sgdm": (1e-2, 1e-1), "adamw-cosine": (1e-2, 1e-1)}


def measure(out, optimizers=("sgdm",), **options):
    options = {"suite": ME, "tasks": ["quadratic"], "seeds": 2, "grids": GRIDS, **options}
    return evaluate(list(optimizers), out, say=lambda line: None, **options)


def curve(losses, every=10, diverged=False):
    at = [every * k for k in range(len(losses))]
    losses = list(losses)
    return Curve(at, losses, losses, seconds=1, cpu_seconds=1, ran=at[-1], diverged=diverged)


# ---------------------------------------------------------------------------------------- speed-up


ADAM = curve([1 - k / 100 for k in range(61)])  # straight line: loss 1 - step / 1000, to step 600


@pytest.mark.parametrize(
    ("final", "steps", "expected"),
    [
        (0.9, 100, 1.0),  # Adam is at 0.9 after 100 steps
        (0.8, 100, 2.0),
        (0.5, 100, 5.0),
        (0.955, 100, 0.45),  # slower than Adam, and between two evaluation points
        (0.8, 50, 4.0),  # counted in the optimizer's own steps
        (1.2, 100, 0.0),  # worse than the initial loss
    ],
)
def test_speed_up_on_a_straight_line(final, steps, expected):
    value, capped = cv.speed_up(ADAM, curve([1.0, final], every=steps))
    assert value == pytest.approx(expected, rel=1e-9)
    assert not capped


def test_speed_up_is_capped_where_adam_never_arrives():
    assert cv.speed_up(ADAM, curve([1.0, 0.3], every=100)) == (CAP, True)


def test_speed_up_of_a_diverged_run_is_zero():
    assert cv.speed_up(ADAM, curve([1.0, math.inf], every=100, diverged=True)) == (0.0, False)


def test_speed_up_ignores_one_noisy_point_of_adam():
    losses = list(ADAM.train)
    losses[3] = 0.5  # a single lucky evaluation; the median of three removes it
    noisy = curve(losses)
    value, _ = cv.speed_up(noisy, curve([1.0, 0.8], every=100))
    assert value == pytest.approx(2.0, rel=0.06)


def test_speed_up_counts_the_first_arrival_of_a_curve_that_rises_again():
    losses = [1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.9, 0.9, 0.9, 0.9]
    value, capped = cv.speed_up(curve(losses), curve([1.0, 0.65], every=10))
    assert (value, capped) == (pytest.approx(3.5), False)


def test_speed_up_against_a_diverged_adam_is_the_cap():
    assert cv.speed_up(curve([1.0, math.inf, math.inf]), curve([1.0, 0.9])) == (CAP, True)


def test_a_diverged_run_never_reaches():
    assert cv.reaches(0.5, 1.0) and cv.reaches(0.5, math.inf) and not cv.reaches(math.inf, math.inf)
    assert cv.horizon_speed_up({0.5: math.inf, 1.0: math.inf}, math.inf) == 0
    assert cv.horizon_speed_up({0.5: math.inf, 1.0: 0.3}, math.inf) == 1
    assert cv.first_reaching(curve([math.inf, math.inf]), math.inf) is None


def test_loss_ratio():
    assert cv.loss_ratio(0.4, curve([1.0, 0.1]), ceiling=1.0) == pytest.approx(4.0)
    assert cv.loss_ratio(0.4, curve([1.0, math.inf], diverged=True), ceiling=1.0) == 0.0


# -------------------------------------------------------------------------------------- statistics


def test_iqm_is_the_trimmed_mean_and_forgets_outliers():
    values = np.random.default_rng(0).normal(size=40)
    assert cv.iqm(values) == trim_mean(values, 0.25)
    assert cv.iqm([1, 2, 3, 1e9]) == 2.5


def test_interval_contains_the_iqm_and_shrinks_with_more_seeds():
    generator = np.random.default_rng(1)
    few = [generator.normal(k, 1, size=4) for k in range(5)]
    many = [generator.normal(k, 1, size=64) for k in range(5)]
    for strata in (few, many):
        low, high = cv.iqm_interval(strata)
        assert low < cv.iqm(np.concatenate(strata)) < high
    width = [np.subtract(*cv.iqm_interval(s)[::-1]) for s in (few, many)]
    assert width[1] < 0.75 * width[0]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(60):
        low, high = cv.iqm_interval([generator.normal(3, 1, size=12) for _ in range(4)])
        covered += low < 3 < high
    assert covered >= 50  # 57 expected


def test_interval_is_stratified_differences_between_tasks_do_not_widen_it():
    generator = np.random.default_rng(3)
    noise = [generator.normal(0, 0.01, size=3) for _ in range(6)]
    apart = [100 * k + x for k, x in enumerate(noise)]
    low, high = cv.iqm_interval(apart)
    assert high - low < 0.1


def test_interval_needs_two_seeds():
    assert cv.iqm_interval([[1.0], [2.0]]) is None


# ---------------------------------------------------------------------------------------- the loop


def test_same_weights_and_data_for_every_optimizer_and_length():
    seen = {}

    class Recorded(Regression):
        def batch(self, generator):
            batch = super().batch(generator)
            log.append(batch[0].sum().item())
            return batch

    for name, steps in (("adam", 30), ("sgdm", 30), ("muon-cosine", 30), ("adam", 60)):
        log = []
        entry, _ = op.optimizer_named(name)
        task = Recorded()
        c = cv.run(task, lambda m, steps, e=entry: e.factory(m, 1e-3, steps), 3, steps)
        seen[name, steps] = (c.train[0], log[:30])
    assert len({(start, tuple(batches)) for start, batches in seen.values()}) == 1


def test_a_run_leaves_the_task_as_it_was_and_depends_on_the_seed():
    task = Regression()
    before = copy.deepcopy(task.model.state_dict())
    curves = [cv.run(task, lambda m, steps: op.adam(m, 1e-2, steps), s, 20) for s in (0, 0, 1)]
    assert curves[0].train == curves[1].train != curves[2].train
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_run_matches_a_loop_written_by_hand():
    task = Quadratic()
    c = cv.run(task, lambda m, steps: op.sgdm(m, 0.1, steps), 5, 40)
    w = task.init(torch.Generator().manual_seed(5))["weight"].clone().requires_grad_()
    optimizer = torch.optim.SGD([w], 0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss({"weight": w}, task.train_eval()).backward()
        optimizer.step()
    expected = task.loss({"weight": w}, task.train_eval()).item()
    assert c.final_train == pytest.approx(expected, rel=1e-5)
    assert (c.at[0], c.at[-1], c.ran) == (0, 40, 40)


def test_the_beginning_of_a_long_run_is_the_short_run():
    task = Regression()
    short, long = (cv.run(task, lambda m, steps: op.adam(m, 1e-2, steps), 0, steps) for steps in (30, 180))
    beginning = long.until(30, task.ceiling)
    assert (beginning.at, beginning.train) == (short.at, short.train)
    assert beginning.held_out == short.held_out


@pytest.mark.parametrize(("steps", "horizon"), [(1, 1), (7, 7), (333, 333), (1998, 333), (120, 400)])
def test_evaluation_steps(steps, horizon):
    at = cv.evaluation_steps(steps, horizon)
    assert (at[0], at[-1]) == (0, steps)
    assert at == sorted(set(at))
    assert len(at) <= 2 + cv.POINTS * max(1, steps / horizon)
    if steps >= horizon:
        assert at[: at.index(horizon) + 1] == cv.evaluation_steps(horizon, horizon)


def test_evaluation_batches_are_cut_evenly_and_never_below_256_examples():
    task = Regression()
    task.x, task.y = torch.arange(2048.0).repeat(4, 1).T, torch.zeros(2048, 2)
    task.train_eval = lambda: (task.x[:1024], task.y[:1024])
    train, held_out = cv.evaluation_batches(task)  # batches of 16: 256 examples
    assert torch.equal(train[0][:, 0], torch.arange(0, 1024.0, 4))
    assert len(held_out[0]) == len(held_out[1]) == 256
    task.train_eval = lambda: (task.x[:200], task.y[:200])
    assert len(cv.evaluation_batches(task)[0][0]) == 200


def test_divergence_is_marked_and_stops_the_run():
    c = cv.run(Quadratic(steps=1000), lambda m, steps: op.sgdm(m, 100.0, steps), 0, 1000)
    assert c.diverged
    assert c.ran < 1000
    assert c.final_train == math.inf
    assert len(c.train) == len(c.held_out) == len(c.at)
    assert math.isfinite(c.train[0])


def test_a_finite_but_large_final_loss_is_divergence_too():
    c = cv.run(Quadratic(), lambda m, steps: op.sgdm(m, 4.2, steps), 0, 10)
    assert math.isfinite(c.final_train) and c.final_train > 30
    assert c.diverged and c.ran == 10


def test_negative_losses_are_refused_and_zero_is_not():
    def make(model, steps):
        return op.adam(model, 1e-2, steps)

    with pytest.raises(TaskError, match="task 'regression' has a loss of -.*must stay positive"):
        cv.run(Lowered(by=50.0), make, 0, 5)
    held_out = Lowered(by=0.0)
    held_out.y[64:] = torch.nan
    assert cv.run(held_out, make, 0, 5).held_out == [math.inf] * 6
    held_out.loss = lambda params, batch: -Regression.loss(held_out, params, batch) * (len(batch[0]) == 32)
    held_out.y[64:] = 1.0
    with pytest.raises(TaskError):
        cv.run(held_out, make, 0, 5)
    nothing = Regression()
    nothing.loss = lambda params, batch: 0 * Regression.loss(nothing, params, batch) - 1e-9  # but for rounding
    assert not cv.run(nothing, make, 0, 5).diverged


@pytest.mark.parametrize("ceiling", [-1.0, 0.0, math.nan, math.inf])
def test_a_ceiling_that_is_not_positive_is_refused_before_anything_runs(tmp_path, monkeypatch, ceiling):
    monkeypatch.setitem(SUITE, "odd", lambda: Lowered(ceiling=ceiling))
    with pytest.raises(TaskError, match="its ceiling .* must be positive and finite"):
        measure(tmp_path, tasks=["odd"])
    assert not (tmp_path / "runs.jsonl").exists()


def test_weights_that_do_not_fit_the_model_are_refused():
    task = Quadratic()
    task.init = lambda generator: {"w": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match="must name every parameter"):
        cv.run(task, lambda m, steps: op.adam(m, 0.1, steps), 0, 5)


# -------------------------------------------------------------------------------------- optimizers


def test_every_baseline_lowers_the_loss_and_has_a_grid_of_half_decades():
    for name, (factory, grid, package, _) in op.OPTIMIZERS.items():
        assert grid is not None and len(grid) >= 7
        assert np.diff(np.log10(grid)) == pytest.approx(0.5, abs=0.01)
        if package is not None:
            pytest.importorskip(package)
        lr = 1.0 if name.startswith("prodigy") else 1e-2
        c = cv.run(Regression(), lambda m, steps, f=factory, lr=lr: f(m, lr, steps), 0, 30)
        assert c.final_train < c.train[0], name
        if name.endswith("-cosine"):
            assert op.OPTIMIZERS[name.removesuffix("-cosine")].grid == grid


def test_schedule_free_is_measured_at_its_averages():
    """And trains on from where it was: measuring changes nothing."""
    schedulefree = pytest.importorskip("schedulefree")
    task = Regression()
    c = cv.run(task, lambda m, steps: op.schedule_free(m, 0.03, steps), 0, 20)
    generator = torch.Generator().manual_seed(0)
    weights = {n: w.requires_grad_() for n, w in task.init(generator).items()}
    optimizer = schedulefree.AdamWScheduleFree(weights.values(), lr=0.03)
    optimizer.train()
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(weights, task.batch(generator)).backward()
        optimizer.step()
    with torch.no_grad():
        during = float(task.loss(weights, cv.evaluation_batches(task)[0]))
        optimizer.eval()
        averaged = float(task.loss(weights, cv.evaluation_batches(task)[0]))
    assert c.final_train == pytest.approx(averaged, rel=1e-4) != pytest.approx(during, rel=1e-4)


def test_a_missing_package_is_named_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(op.importlib.util, "find_spec", lambda name: None)
    op.optimizer_named.cache_clear()
    with pytest.raises(UnknownName, match=r"learned-opt\[benchmark\]"):
        evaluate(["soap"], tmp_path, tasks=["mlp-digits-sin"])
    op.optimizer_named.cache_clear()


def test_muon_takes_hidden_matrices_only():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.pos = nn.Parameter(torch.zeros(3, 4))
            self.norm = nn.LayerNorm(4)
            self.conv = nn.Conv2d(4, 4, 3)
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
            self.head = nn.Linear(4, 5)

    assert op.hidden_matrices(Block()) == {"fc1.weight", "fc2.weight"}
    assert op.hidden_matrices(Regression().model) == {"2.weight"}
    assert op.hidden_matrices(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))) == set()
    joined, _ = op.muon(Regression().model, 1e-2, 10)
    assert [type(part).__name__ for part in joined.parts] == ["AdamW", "Muon"]
    assert [p.shape for p in joined.param_groups[1]["params"]] == [(8, 8)]


def test_cosine_reaches_zero_in_every_part():
    model = Regression().model
    optimizer, scheduler = op.OPTIMIZERS["muon-cosine"].factory(model, 1e-2, 10)
    for _ in range(10):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.0, 0.0]


def test_tuning_picks_the_right_rate_on_a_quadratic(tmp_path):
    # Momentum 0.9, curvatures 1, 0.5, 0.25, 40 steps: too small a rate is slow, 10 diverges.
    rates = (1e-3, 1e-2, 1e-1, 10.0)
    found = measure(tmp_path, ["sgdm"], grids={**GRIDS, "sgdm": rates})
    losses = {}
    for lr in rates:
        curves = [cv.run(Quadratic(), lambda m, steps, lr=lr: op.sgdm(m, lr, steps), s, 40) for s in (0, 1)]
        losses[lr] = sum(c.final_train for c in curves)
    assert min(losses, key=losses.get) == 1e-1
    assert {o.lr for o in found if o.optimizer == "sgdm"} == {1e-1}
    assert not any(o.at_edge for o in found if o.optimizer == "sgdm")


def test_a_task_is_identified_but_for_rounding():
    task = Quadratic()
    found = task_fingerprint(task)

    def changed(change):
        other = Quadratic()
        start, held = other.init, other.held_out
        other.init = lambda g: {n: change(x) for n, x in start(g).items()}
        other.held_out = lambda: tuple(change(x) for x in held())
        return task_fingerprint(other)

    assert changed(lambda x: x * (1 + 1e-7)) == found
    assert changed(lambda x: x * 1.01) != found
    assert changed(lambda x: x.flatten().flip(0).reshape(x.shape)) != found


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-7, True), (1.02, False)])
def test_a_task_is_identified_by_what_it_computes(factor, same):
    task = Regression()
    task.loss = lambda params, batch: factor * Regression.loss(task, params, batch)
    assert (task_fingerprint(task) == task_fingerprint(Regression())) == same


@pytest.mark.parametrize("name, value", [("AFTER", 1.3), ("LONGER", 0.06), ("NOISE_LR", 0.6)])
def test_a_rule_is_identified_by_its_later_steps_too(monkeypatch, name, value):
    from learned_opt.rules import auto_lr, make_rule

    before = op.rule_fingerprint(make_rule("auto_lr"))
    monkeypatch.setattr(auto_lr, name, value)  # of steps after the 12th, the 50th and the 36th
    assert op.rule_fingerprint(make_rule("auto_lr")) != before


def test_a_learned_optimizer_is_identified_by_what_it_does(tmp_path):
    from learned_opt import make_rule, save_weights

    rule = make_rule("learned")
    assert op.rule_fingerprint(rule) == op.rule_fingerprint(make_rule("learned"))
    assert op.rule_fingerprint(rule) != op.rule_fingerprint(make_rule("whitened_polar"))
    save_weights(tmp_path / "s@me.safetensors", "learned", rule.state_dict(), {})
    with torch.no_grad():
        next(rule.parameters()).add_(0.1)
    save_weights(tmp_path / "other.safetensors", "learned", rule.state_dict(), {})
    _, same = op.optimizer_named(f"nfn:{tmp_path / 's@me.safetensors'}")
    _, other = op.optimizer_named(f"nfn:{tmp_path / 'other.safetensors'}")
    assert same == op.optimizer_named("nfn:learned")[1] != other


def test_learned_optimizers_are_evaluated_untuned_under_their_labels(tmp_path):
    found = measure(tmp_path, ["mine=nfnopt", "polar=nfn:whitened_polar"], tasks=["regression"])
    mine = [o for o in found if o.optimizer in ("mine", "polar")]
    assert [o.lr for o in mine] == [None] * 4
    assert all(o.curve.final_train < o.curve.train[0] for o in mine)
    with pytest.raises(UnknownName, match="whitened_polar"):
        measure(tmp_path, ["nfn:whitened_polarr"])


def test_a_rule_is_run_at_a_multiple_of_its_rate_or_without_its_horizon():
    model = torch.nn.Linear(3, 2)

    def group(name):
        return op.optimizer_named(name)[0].factory(model, None, steps=7)[0].param_groups[0]

    assert (group("nfn:whitened_polar")["lr"], group("nfn:whitened_polar")["total_steps"]) == (1, 7)
    assert (group("nfn:whitened_polar@lr=0.3")["lr"], group("nfn:whitened_polar@lr=0.3")["total_steps"]) == (0.3, 7)
    free = "nfn:whitened_polar@without-total-steps"
    assert (group(f"{free}@lr=3")["lr"], group(free)["total_steps"]) == (3, None)
    plan = ev.make_plan(
        "VALID", ["vit-digits"], ["low=nfn:whitened_polar@lr=0.3", "nfn:whitened_polar@lr=3"], 1, 1, (), None, 9, None
    )
    assert [o.name for o in plan.optimizers.values()] == [
        "adam",
        "nfn:whitened_polar@lr=0.3",
        "nfn:whitened_polar@lr=3",
    ]
    assert list(plan.optimizers) == ["adam", "low", "nfn:whitened_polar@lr=3"]
    names = (free, *(f"nfn:whitened_polar{option}" for option in ("", "@lr=3", "@lr=0.3")))
    thetas = {op.optimizer_named(name)[1] for name in names}
    assert len(thetas) == 4  # else one would take the other's runs for its own
    default = inspect.signature(learned_opt.NFNOpt).parameters["rule"].default
    assert op.optimizer_named("nfnopt@lr=2")[1] == op.optimizer_named("nfn:auto_lr@lr=2")[1]
    assert f"nfn:{default}" == op.DEFAULT
    for wrong in ("lr", "lr=fast", "told", "without-total-steps=1", "0.3"):
        with pytest.raises(UnknownName, match="@lr=NUMBER"):
            op.optimizer_named(f"nfn:whitened_polar@{wrong}")


# ------------------------------------------------------------------------------- whole evaluations


def test_horizon_speed_up_of_an_optimizer_without_total_steps_is_read_off_its_curve(tmp_path):
    spec = "free=nfn:whitened_polar@without-total-steps"
    found = measure(tmp_path, [spec], tasks=["regression"], seeds=1, horizon=["free/adam"], grids={"adam": (1e-4,)})
    (free,) = (o for o in found if o.optimizer == "free")
    (adam,) = (o for o in found if o.optimizer == "adam")
    task = Regression()
    at = cv.first_reaching(free.curve, adam.curve.final_train)
    expected = task.steps / max(at, 0.1 * task.steps)
    assert free.horizon_speed_ups["adam"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1
    runs = [r["job"]["steps"] for r in map(json.loads, (tmp_path / "runs.jsonl").open()) if "job" in r]
    assert runs.count(task.steps) == 2  # Adam's tuning run and one of the rule


@pytest.mark.parametrize(
    ("spec", "rate"), [("sgdm", 100.0), ("sgdm", 1e-2), ("nfn:whitened_polar@without-total-steps@lr=1e9", None)]
)
def test_horizon_speed_up_over_an_optimizer_that_diverged(tmp_path, spec, rate):
    grids = {"adam": (1e6,), "sgdm": (rate,)}
    found = measure(tmp_path, [f"mine={spec}"], tasks=["regression"], seeds=1, horizon=["mine/adam"], grids=grids)
    (mine,) = (o for o in found if o.optimizer == "mine")
    assert mine.curve.diverged == (rate != 1e-2)
    assert mine.horizon_speed_ups == {"adam": 0.0 if mine.curve.diverged else HORIZON_CAP}
    text = rp.report(tmp_path)
    assert ("| 10+ " in text) != mine.curve.diverged and "10.00" not in text


def test_adam_is_its_own_reference(tmp_path):
    # So small a rate that nothing oscillates: the curve falls until the end.
    found = measure(tmp_path, [], tasks=["regression"], grids={"adam": (1e-3,)})
    assert len(found) == 2
    for outcome in found:
        assert outcome.speed_up == pytest.approx(1.0, rel=1e-6)
        assert outcome.loss_ratio == pytest.approx(1.0)


def test_a_diverging_optimizer_is_marked_and_the_rest_is_measured(tmp_path):
    found = measure(tmp_path, ["sgdm"], grids={**GRIDS, "sgdm": (100.0,)})
    diverged = [o for o in found if o.optimizer == "sgdm"]
    assert [o.curve.diverged for o in diverged] == [True, True]
    assert [(o.speed_up, o.loss_ratio) for o in diverged] == [(0.0, 0.0)] * 2
    assert "2 of 2" in rp.report(tmp_path)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_table(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    optimizers = ["sgdm", "adamw-cosine"]
    tasks = ["quadratic", "noisy"]
    expected = measure(whole, optimizers, tasks=tasks)
    total = len(Store(whole / "runs.jsonl").runs)

    done = []
    work = ev.work

    def stop_after_seven(job, data, steps):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(job.key)
        return work(job, data, steps)

    monkeypatch.setattr(ev, "work", stop_after_seven)
    with pytest.raises(KeyboardInterrupt):
        measure(broken, optimizers, tasks=tasks)
    with open(broken / "runs.jsonl", "a") as file:
        file.write('{"job": {"suite": "cut off')  # as by a crash in the middle of a line

    def count(job, data, steps):
        done.append(job.key)
        return work(job, data, steps)

    monkeypatch.setattr(ev, "work", count)
    found = measure(broken, optimizers, tasks=tasks)
    assert len(done) == len(set(done)) == total

    def essence(outcomes):
        return [
            (o.optimizer, o.task, o.seed, o.lr, o.speed_up, o.curve.train) for o in outcomes
        ]  # all but the wall clock

    # What was read back is rounded to the six digits of the file.
    for (*names, speed, train), (*names2, speed2, train2) in zip(essence(found), essence(expected), strict=True):
        assert names == names2
        assert speed == pytest.approx(speed2, rel=1e-3)
        assert train == pytest.approx(train2, rel=1e-5)

    done.clear()
    measure(broken, optimizers, tasks=tasks)
    assert done == []


def test_more_seeds_run_only_what_is_new_and_another_task_of_that_name_everything(tmp_path, monkeypatch):
    measure(tmp_path, seeds=2)
    done, work = [], ev.work
    monkeypatch.setattr(ev, "work", lambda job, **kw: done.append(job) or work(job, **kw))
    measure(tmp_path, seeds=3)
    assert {job.seed for job in done} == {2}
    done.clear()
    measure(tmp_path, seeds=3, steps=20)  # another horizon: another fingerprint
    assert {job.seed for job in done} == {0, 1, 2}


def test_horizon_speed_up_is_interpolated_between_runs():
    power = {r: r**-0.5 for r in (0.25, 0.5, 1.0, 2.0)}  # a power law: the interpolation is exact
    for r in (0.25, 0.3, 0.5, 0.9, 1.0, 1.3, 2.0):
        assert cv.horizon_speed_up(power, r**-0.5) == pytest.approx(1 / r)
    assert cv.horizon_speed_up(power, 0.7) == 0  # twice the steps are not enough
    assert cv.horizon_speed_up(power, 10.0) == 4  # the shortest run already reaches it
    assert cv.horizon_speed_up({0.5: math.inf, 1.0: 1.0}, 1.5) == 1  # nothing to interpolate with
    assert cv.horizon_speed_up({0.5: 1e-31, 1.0: 0.0}, 0.0) == 1  # nor a logarithm


@pytest.mark.parametrize("rate", [1e-1, 1e-4])
def test_horizon_speed_up(tmp_path, rate):
    grids = {"sgdm": (rate,), "adam": (1e-3,)}
    found = measure(tmp_path, ["sgdm"], seeds=1, horizon=["adam"], grids=grids)
    value = next(o.horizon_speed_ups["adam"] for o in found if o.optimizer == "sgdm")
    target = next(o.curve.final_train for o in found if o.optimizer == "adam")

    def loss(r):
        return cv.run(Quadratic(), lambda m, steps: op.sgdm(m, rate, steps), 0, round(40 * r)).final_train

    assert value == pytest.approx(cv.horizon_speed_up({r: loss(r) for r in HORIZONS}, target))
    assert value > 1 if rate == 1e-1 else value < 1
    assert "horizon speed-up over adam" in rp.report(tmp_path)
    assert f"{len(Store(tmp_path / 'runs.jsonl').runs)} runs: 0.0 hours" in rp.report(tmp_path)
    rows = [line.split() for line in rp.report(tmp_path).splitlines()]
    shown = "10+" if value == HORIZON_CAP else f"{value:.2f}"
    assert ["|", "sgdm", "|", shown, "|"] in [row[:5] for row in rows]
    assert (shown == "10+") == (rate == 1e-1)
    pair = measure(tmp_path, ["sgdm"], seeds=1, horizon=["sgdm/adam"], grids=grids)
    read = [o.horizon_speed_ups for o in pair]  # from runs.jsonl: six digits
    assert read == [pytest.approx(o.horizon_speed_ups, rel=1e-3) for o in found]


def test_workers_give_what_one_process_gives(tmp_path):
    one = measure(tmp_path / "one", seeds=1, tasks=["noisy"])
    two = measure(tmp_path / "two", seeds=1, tasks=["noisy"], workers=2)
    assert [o.curve.train for o in one] == [o.curve.train for o in two]


ORPHANS = """
import multiprocessing, sys, time
from meta_train.bench.jobs import begin_worker
def work():
    begin_worker()
    print("begun", flush=True)
    time.sleep(100)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


def test_a_killed_evaluation_takes_its_workers_along(tmp_path):
    (tmp_path / "parent.py").write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=environment, stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())
    try:
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        parent.communicate(timeout=20)  # the worker holds the pipe for as long as it lives
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_store_keeps_infinities_as_valid_json(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    job = Job("S", "t", "f", "adam", "", 1e-3, 0, 10)
    store.add(job, curve([1.0, math.inf], diverged=True))
    line = (tmp_path / "runs.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["curve"]["train"] == [1.0, None]
    assert Store(tmp_path / "runs.jsonl").runs[job.key].train == [1.0, math.inf]


# ------------------------------------------------------------------------------------------ report


def test_report_writes_table_and_pictures(tmp_path):
    measure(tmp_path, ["sgdm", "adamw-cosine"], tasks=["quadratic", "regression"])
    text = rp.report(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    for name in ("curves.png", "speedups.png", "profile.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {row.split("|")[1].strip() for row in rows} == {
        "optimizer",
        "adam",
        "sgdm",
        "adamw-cosine",
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_pictures_show_the_fastest_and_adam_each_in_a_colour_of_its_own():
    speed_ups = {f"o{i}": 9.0 - i for i in range(9)} | {"adam": 0.5, "o0@all": 8.5}
    optimizers = {n: PlannedOptimizer(n, "", None, shared="@" in n) for n in reversed(speed_ups)}
    plan = Plan("S", {"t": PlannedTask(10, 1.0, "f")}, optimizers, seeds=1, tuning_seeds=1)
    found = [Outcome(n, "t", 0, None, False, curve([1.0]), x, False, x, {}) for n, x in speed_ups.items()]
    colours = colours_of(plan, found)
    assert list(colours) == [*(f"o{i}" for i in range(7)), "adam"]
    assert len(set(colours.values())) == 8
    assert list(colours_of(plan, found[:3])) == ["o0", "o1", "o2"]


def test_report_of_an_unfinished_evaluation_shows_what_is_there(tmp_path):
    measure(tmp_path)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]))
    assert "Incomplete: " in rp.report(tmp_path)


def test_report_on_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="evaluate --out"):
        main(["report", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\xff\x00\n\xfe", "without a plan"),
        (b"1\n[2]\n", "without a plan"),
        (b'{"job": {}}\n', "is not of an evaluation"),
        (b'{"plan": 3}\n', "is not of an evaluation"),
        (b'{"job": {"method": "HNP"}, "measures": {}}\n', "is not of an evaluation"),
    ],
)
def test_report_on_another_file_says_so(tmp_path, content, message):
    (tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        main(["report", str(tmp_path)])


def test_report_shows_a_training_and_an_evaluation_in_one_folder(tmp_path, capsys):
    measure(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "loss/mlp": 0.5}\n{"loss": 2}\n')
    main(["report", str(tmp_path)])
    said = capsys.readouterr().out
    assert "training.png" in said and "| sgdm" in said
    assert (tmp_path / "training.png").exists() and (tmp_path / "report.md").exists()


# ------------------------------------------------------------------------------------ command line


def test_a_shared_rate_is_the_best_over_all_tasks_and_needs_no_tuning_of_its_own(tmp_path):
    rates = (1e-2, 1e-1, 1.0)
    options = {"tasks": ["quadratic", "regression"], "grids": {**GRIDS, "sgdm": rates}}
    found = measure(tmp_path, ["sgdm", "sgdm@all"], **options)
    chosen = {(o.optimizer, o.task): o.lr for o in found}
    runs = Store(tmp_path / "runs.jsonl").runs
    curves = {(key[1], key[5], key[6]): c for key, c in runs.items() if key[3] == "sgdm"}

    def mean_log(lr):
        total = 0.0
        for task, ceiling in {"quadratic": 10.0, "regression": 4.0}.items():
            both = [curves[task, lr, seed] for seed in (0, 1)]
            mean = math.inf if any(c.diverged for c in both) else (both[0].final_train + both[1].final_train) / 2
            total += math.log(min(mean, 3 * ceiling))
        return total

    best = min(rates, key=mean_log)
    assert {chosen["sgdm@all", task] for task in options["tasks"]} == {best}
    assert chosen["sgdm", "quadratic"] != chosen["sgdm", "regression"]
    shared = {(o.task, o.seed): o for o in found if o.optimizer == "sgdm@all"}
    assert len(shared) == 4 and all(not o.curve.diverged for o in shared.values())
    assert len(curves) == len(rates) * 2 * 2
    with pytest.raises(UnknownName, match="no learning rate to share"):
        measure(tmp_path, ["nfnopt@all"])


def test_unknown_names_list_the_valid_ones(tmp_path):
    with pytest.raises(UnknownName, match="adam-cosine, adamw, adamw-cosine"):
        measure(tmp_path, ["adamm"])
    with pytest.raises(UnknownName, match="quadratic, noisy, regression"):
        measure(tmp_path, tasks=["quadratik"])
    with pytest.raises(UnknownName, match="VALID, HELD_OUT"):
        measure(tmp_path, suite="VALIDD")
    with pytest.raises(UnknownName, match="VALID, HELD_OUT"):
        measure(tmp_path, suite="no.such.module:SUITE")
    for attribute in ("FAMILIES", "LIST", "measure"):
        with pytest.raises(UsageError, match="must be a dict of functions without arguments"):
            measure(tmp_path, suite=ME.replace("SUITE", attribute))
    with pytest.raises(UnknownName, match="Valid labels: adam, sgdm"):
        measure(tmp_path, horizon=["muon"])
    assert not (tmp_path / "runs.jsonl").exists()


def test_command_line_evaluates_and_reports(tmp_path, capsys):
    arguments = [
        "--suite",
        ME,
        "--tasks",
        "quadratic,noisy",
        "--optimizers",
        "sgdm",
        "--seeds",
        "1",
    ]
    arguments += ["--workers", "1", "--steps", "12", "--out", str(tmp_path)]
    main(["evaluate", *arguments])
    first = capsys.readouterr().out
    assert "| sgdm" in first and "[tuning 1/" in first
    main(["report", str(tmp_path)])
    assert "| sgdm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--optimizers", "adamm"], "unknown optimizer 'adamm'. Valid names: adam"),
        (
            ["evaluate", "--optimizers", "adam", "--tasks", "x"],
            "unknown task 'x' in .*Valid tasks: quad",
        ),
    ],
)
def test_command_line_says_what_is_wrong(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--suite", ME, "--out", str(tmp_path)])


def test_recipes_by_name_or_file(tmp_path):
    from meta_train.__main__ import recipe_named
    from meta_train.recipes import RECIPES

    assert recipe_named("tiny") == RECIPES["tiny"]()
    (tmp_path / "mine.py").write_text("from meta_train.recipes import RECIPES\nrecipe = RECIPES['demo']\n")
    assert recipe_named(str(tmp_path / "mine.py")) == RECIPES["demo"]()
    (tmp_path / "empty.py").write_text("")
    for name, message in {
        "tinyy": "Valid recipes: demo, tiny",
        str(tmp_path / "none.py"): "there is no file",
        str(tmp_path / "empty.py"): "defines no recipe",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main(["train", name])


def test_fields_of_a_recipe_are_options_of_train(monkeypatch, tmp_path):
    from meta_train.recipes import RECIPES

    seen = []
    monkeypatch.setattr("meta_train.loop.train", lambda recipe, out, resume, **_: seen.append((recipe, out, resume)))
    main(["train", "tiny", "--outer-steps", "7", "--resume", "never", "--out", str(tmp_path)])
    recipe, out, resume = seen[0]
    assert (recipe.outer_steps, out, resume) == (7, tmp_path, "never")
    assert dataclasses.replace(recipe, outer_steps=4) == RECIPES["tiny"]()


def test_missing_extra_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match=r"pip install 'learned-opt\[meta\]'"):
        main(["report", str(tmp_path)])


@pytest.mark.slow
def test_ctrl_c_leaves_a_valid_file_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "meta_train", "evaluate", "--suite", ME, "--workers", "2"]
    command += ["--optimizers", "sgdm", "--steps", "2000", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("[tuning 2/"):
            break
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert process.returncode == 1
    assert "the same command goes on" in errors and "Traceback" not in errors
    assert len(Store(tmp_path / "runs.jsonl").runs) >= 2
