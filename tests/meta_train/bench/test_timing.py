"""CPU seconds of steps: turns, sums, what is stored and not measured again, and the arithmetic of time to a loss."""

import dataclasses
import itertools
import json
import statistics
from functools import partial

import pytest
import torch

from meta_train.bench import evaluate as ev
from meta_train.bench import optimizers as op
from meta_train.bench import report as rp
from meta_train.bench.curves import CAP, Curve, evaluation_steps
from meta_train.bench.outcomes import job, outcomes, timing_job
from meta_train.bench.pictures import draw_seconds
from meta_train.bench.store import Plan, PlannedOptimizer, PlannedTask, Store
from meta_train.bench.timing import (
    PERIOD,
    STEPS,
    WARM_UP,
    Contender,
    StepSeconds,
    TaskSteps,
    TimingStore,
    in_turns,
    time_steps,
)
from tests.meta_train.bench.tiny import Quadratic, Regression, measure

# ------------------------------------------------------------------------------------------ turns


def test_contenders_take_turns_and_each_begins_a_round_in_turn():
    log = []

    def contender(name):
        numbers = itertools.count()
        return lambda: log.append(name) or {"step": float(next(numbers))}

    found = in_turns({n: contender(n) for n in "abc"}, warm_up=1, steps=5, turn=2)
    assert "".join(log) == "abc" + "bbccaa" + "ccaabb" + "abc"
    for first, laps in found.values():
        assert [lap["step"] for lap in first] == [0.0]
        assert [lap["step"] for lap in laps] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_contender_that_cannot_go_on_is_left_out():
    steps = iter([{"step": 1.0}] * 3 + [None])
    found = in_turns({"a": lambda: {"step": 1.0}, "b": lambda: next(steps)}, warm_up=1, steps=4, turn=2)
    assert list(found) == ["a"] and len(found["a"][1]) == 4


def test_seconds_are_means_over_whole_periods():
    laps = [{"data": 1.0, "gradient": 2.0, "step": 10.0 if k % PERIOD == 7 else 0.0} for k in range(2 * PERIOD)]
    found = StepSeconds.of(0.5, laps)  # a rule that works now and then: its median step costs nothing
    assert (found.data, found.gradient, found.step) == (1.0, 2.0, 10 / PERIOD)
    assert found.whole == 3 + 10 / PERIOD and found.spread == pytest.approx(0, abs=1e-12)
    assert (found.first, found.steps) == (0.5, 2 * PERIOD)
    laps[0]["data"] = 1.0 + PERIOD
    assert StepSeconds.of(0.5, laps).spread == pytest.approx(statistics.pstdev([4.2, 3.2]))
    for wrong in (0, 1, PERIOD + 1):
        with pytest.raises(ValueError, match=f"{wrong} steps were measured: they must be a multiple"):
            StepSeconds.of(0.5, laps[:wrong])


def test_each_part_of_a_step_is_what_the_clock_says_of_it():
    ticks = itertools.count()
    makers = {name: partial(op.OPTIMIZERS[name].factory, lr=1e-2) for name in ("adam", "sgdm-cosine")}
    found = time_steps(Quadratic(), makers, steps=PERIOD, clock=lambda: float(next(ticks)))
    expected = StepSeconds(data=1.0, gradient=1.0, step=1.0, spread=0.0, first=1.0 + WARM_UP, steps=PERIOD)
    assert found == {"adam": expected, "sgdm-cosine": expected}
    assert next(ticks) == 2 * (2 + 4 * (WARM_UP + PERIOD))  # read at each boundary, and nowhere else


def test_steps_in_turns_are_the_steps_that_each_makes_alone():
    def steps(name):
        return TaskSteps(Regression(), partial(op.OPTIMIZERS[name].factory, lr=1e-2), 3, lambda: 0.0)

    together = {name: steps(name) for name in ("adam", "sgdm")}
    in_turns(together, warm_up=2, steps=5, turn=2)
    for name, made in together.items():
        alone = steps(name)
        for _ in range(7):
            alone()
        assert all(torch.equal(p, alone.params[n]) for n, p in made.params.items())


def test_an_optimizer_whose_loss_becomes_infinite_has_no_seconds():
    makers = {lr: partial(op.sgdm, lr=lr) for lr in (1e-2, 1e9)}
    assert list(time_steps(Quadratic(), makers, steps=PERIOD)) == [1e-2]


# ------------------------------------------------------------------------------------------ the store


def timings(folder):
    lines = map(json.loads, (folder / "runs.jsonl").open())
    return [[c["optimizer"] for c in line["timing"]["contenders"]] for line in lines if "timing" in line]


def test_seconds_are_measured_once_and_together(tmp_path, monkeypatch):
    found = measure(tmp_path, ["sgdm", "again=sgdm"], tasks=["quadratic", "regression"], seeds=1)
    assert timings(tmp_path) == [["adam", "sgdm"]] * 2  # two labels, one optimizer at one rate
    assert all(o.seconds.steps == STEPS and o.seconds.whole > 0 and o.time_speed_up is not None for o in found)
    same = {o.task: o.seconds for o in found if o.optimizer == "again"}
    assert all(o.seconds == same[o.task] for o in found if o.optimizer == "sgdm")
    measure(tmp_path, [], tasks=["quadratic"], seeds=2)  # part of what is there
    assert len(timings(tmp_path)) == 2
    measure(tmp_path, ["sgdm", "adamw-cosine"], tasks=["quadratic"], seeds=1)
    assert timings(tmp_path)[2:] == [["adam", "sgdm", "adamw-cosine"]]
    read = outcomes(Store(tmp_path / "runs.jsonl").plan, Store(tmp_path / "runs.jsonl").runs, None)
    assert all(o.seconds is None and o.time_speed_up is None for o in read)


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    done, original = [], ev.time_job

    def stop_after_one(job, data, steps):
        if done:
            raise KeyboardInterrupt
        done.append(job.task)
        return original(job, data, steps)

    monkeypatch.setattr(ev, "time_job", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, tasks=["quadratic", "noisy"], seeds=1)
    plan, store = Store(tmp_path / "runs.jsonl").plan, Store(tmp_path / "runs.jsonl")
    halfway = outcomes(plan, store.runs, TimingStore(tmp_path / "runs.jsonl"))
    assert {(o.task, o.seconds is None) for o in halfway} == {("quadratic", False), ("noisy", True)}
    assert "Milliseconds of a training step" in rp.report(tmp_path)
    monkeypatch.setattr(ev, "time_job", lambda job, data, steps: done.append(job.task) or original(job, data, steps))
    whole = measure(tmp_path, tasks=["quadratic", "noisy"], seeds=1)
    assert done == ["quadratic", "noisy"] and all(o.seconds for o in whole)


def test_the_symmetry_is_part_of_the_first_steps(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(ev.time, "process_time", lambda: float(next(clock)))  # inference: one second
    monkeypatch.setattr(ev, "time_steps", lambda task, make: dict.fromkeys(make, SECONDS))
    task = Regression()
    contenders = tuple(Contender(n, op.optimizer_named(n)[1], lr) for n, lr in (("adam", 1e-2), ("nfnopt", None)))
    monkeypatch.setattr(ev, "task_named", lambda *_: task)
    found = ev.time_job(ev.TimingJob("s", "t", "f", contenders), None, None)
    assert [s.first for s in found.values()] == [SECONDS.first, SECONDS.first + 1]


# ------------------------------------------------------------------------------------ time to a loss

SECONDS = StepSeconds(data=1.0, gradient=2.0, step=1.0, spread=0.1, first=5.0, steps=150)


def falling(steps, final, horizon=100):
    """A run whose loss falls along a straight line from 1."""
    at = evaluation_steps(steps, horizon)
    losses = [1 - (1 - final) * k / steps for k in at]
    return Curve(at, losses, losses, seconds=1.0, cpu_seconds=1.0, ran=steps, diverged=False)


@pytest.fixture
def made_up(tmp_path):
    """Adam falls by 0.1 in 100 steps; ``mine``, with ``total_steps``, ends 100 steps at 0.6, 50 at 0.8, 25 at 0.9.

    ``rival`` ends at 0.8. A step of Adam takes 4 s, of the rival 6 s, of mine 12 s.
    """
    optimizers = {
        "adam": PlannedOptimizer("adam", "", (0.1,)),
        "rival": PlannedOptimizer("sgdm", "", (0.1,)),
        "mine": PlannedOptimizer("nfnopt", "t", None),
    }
    plan = Plan("S", {"task": PlannedTask(100, 2.0, "f")}, optimizers, 1, 1, (("mine", "rival"), ("mine", "adam")))
    store = Store(tmp_path / "runs.jsonl")
    store.add_plan(plan)
    store.add(job(plan, "task", "adam", 0.1, 0, 100), falling(100, 0.9))
    store.add(job(plan, "task", "adam", 0.1, 0, 100 * CAP), falling(100 * CAP, 1 - 0.1 * CAP))
    store.add(job(plan, "task", "rival", 0.1, 0, 100), falling(100, 0.8))
    ends = {100: 0.6, 80: 0.67, 67: 0.73, 50: 0.8, 40: 0.85, 33: 0.87, 25: 0.9, 20: 0.93, 15: 0.95, 10: 0.97}
    for steps, final in ends.items():
        store.add(job(plan, "task", "mine", None, 0, steps), falling(steps, final))
    times = TimingStore(store.path)
    seconds = {"adam": 1.0, "sgdm": 3.0, "nfnopt": 9.0}
    asked = timing_job(plan, store.runs, "task")
    times.add(asked, {c.identity: dataclasses.replace(SECONDS, step=seconds[c.optimizer]) for c in asked.contenders})
    return plan, store, times


def test_time_to_the_final_loss_of_a_rival(made_up, tmp_path):
    plan, store, times = made_up
    by_label = {o.optimizer: o for o in outcomes(plan, store.runs, times)}
    mine = by_label["mine"]
    assert mine.horizon_speed_ups == {"rival": pytest.approx(2.0), "adam": pytest.approx(4.0)}
    # the rival's 100 steps of 6 s over 50 steps of 12 s; Adam's 100 of 4 s over 25 of 12 s
    assert mine.time_speed_ups == {"rival": pytest.approx(600 / 600), "adam": pytest.approx(400 / 300)}
    # Adam needs 400 steps of 4 s to 0.6, the final loss of 100 steps of 12 s
    assert mine.time_speed_up == pytest.approx(1600 / 1200)
    assert by_label["rival"].time_speed_up == pytest.approx(200 * 4 / 600)
    assert by_label["adam"].time_speed_up == pytest.approx(1.0)
    text = rp.report(tmp_path)
    assert "| in time  | 1.00 |" in text and "| in time  | 1.33 |" in text
    assert "In time slower than adam on: no task." in text
    assert "1e+03 + 2e+03 + 9e+03 (± 1e+02)" in text
    assert (tmp_path / "seconds.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_where_an_optimizer_is_slower(made_up, tmp_path):
    plan, store, times = made_up
    asked = timing_job(plan, store.runs, "task")
    slow = {c.identity: dataclasses.replace(SECONDS, step=17.0 if c.theta else 1.0) for c in asked.contenders}
    times.add(asked, slow)  # the last measurement counts
    (mine,) = (o for o in outcomes(plan, store.runs, TimingStore(store.path)) if o.optimizer == "mine")
    assert mine.time_speed_ups == {"rival": pytest.approx(0.4), "adam": pytest.approx(0.8)}
    text = rp.report(tmp_path)
    assert "In time slower than rival on: task." in text and "In time slower than adam on: task." in text


def test_no_picture_of_seconds_without_seconds(made_up, tmp_path):
    plan, store, _ = made_up
    assert not draw_seconds(plan, outcomes(plan, store.runs), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
