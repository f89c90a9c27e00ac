"""Whole evaluations: tuning, horizons, interruption, workers, the command line."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meta_train.__main__ import main
from meta_train.bench import curves as cv
from meta_train.bench import evaluate as ev
from meta_train.bench import optimizers as op
from meta_train.bench import report as rp
from meta_train.bench.outcomes import HORIZON_CAP, HORIZONS
from meta_train.bench.store import Job, Store
from meta_train.bench.suites import suite_named
from meta_train.errors import UnknownName, UsageError
from tests.meta_train.bench.tiny import GRIDS, ME, Quadratic, Regression, curve, measure

ROOT = Path(__file__).parents[3]


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
    assert f"{len(Store(tmp_path / 'runs.jsonl').runs)} runs: " in rp.report(tmp_path)
    rows = [line.split() for line in rp.report(tmp_path).splitlines()]
    shown = "10+" if value == HORIZON_CAP else f"{value:.2f}"
    assert ["|", "in", "steps", "|", shown, "|"] in [row[:6] for row in rows]
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
    with pytest.raises(UnknownName, match=r"unknown suite 'held-out'\. Did you mean HELD_OUT\? Valid suites: VALID, "):
        measure(tmp_path, suite="held-out")
    with pytest.raises(UnknownName, match="no suite 'no.such.module:SUITE'.*SEEN, HELD_OUT, package.module:DICT"):
        measure(tmp_path, suite="no.such.module:SUITE")
    for attribute in ("FAMILIES", "LIST", "measure"):
        with pytest.raises(UsageError, match="must be a dict of functions without arguments"):
            measure(tmp_path, suite=ME.replace("SUITE", attribute))
    with pytest.raises(UnknownName, match="Valid labels: adam, sgdm"):
        measure(tmp_path, horizon=["muon"])
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_suite_is_read_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"from {ME.split(':')[0]} import SUITE as mine\n")
    assert suite_named(f"{file}:mine") is suite_named(ME)
    with pytest.raises(UnknownName, match="No such file"):
        suite_named(f"{tmp_path / 'other.py'}:mine")


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
    assert " sgdm" in first and "[tuning 1/" in first
    main(["report", str(tmp_path)])
    assert " sgdm" in capsys.readouterr().out


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
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
