"""One run and the measures on its curve: known answers, intervals, the loop."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from meta_train.bench import curves as cv
from meta_train.bench import optimizers as op
from meta_train.bench.curves import CAP
from tasks.task import TaskError
from tests.meta_train.bench.tiny import SUITE, Lowered, Quadratic, Regression, curve, measure

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
