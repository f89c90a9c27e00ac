"""Optimizers x tasks x seeds -> curves -> measures, in ordinary ``torch.optim`` loops.

    plan -> tuning runs (learning-rate grids) -> runs at the chosen rate, Adam to 6x -> outcomes

Every finished run is one line of ``runs.jsonl``; a run that is already there is never repeated, so
an interrupted evaluation goes on where it stopped and a second one pays only for what is new.
"""

import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from meta_train.bench.curves import (
    CAP,
    DIVERGED,
    Curve,
    first_reaching,
    horizon_speed_up,
    loss_ratio,
    reaches,
    run,
    speed_up,
)
from meta_train.bench.optimizers import OPTIMIZERS, BadInput, UnknownName, optimizer_named
from meta_train.bench.store import Job, Plan, PlannedOptimizer, PlannedTask, Runs, Store
from meta_train.bench.suites import suite_named, task_fingerprint, task_named
from meta_train.symmetries import symmetry_of
from tasks.task import check_ceiling

HORIZONS = (0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5, 0.67, 0.8, 1.0, 1.25, 1.6, 2.0)  # times a task's own steps
HORIZON_CAP = 1 / HORIZONS[0]  # the largest horizon speed-up
_LABEL = re.compile("([^=:@]+)=")  # but for nfn:RULE@lr=0.3
SHARED = "@all"  # after an optimizer's name: one learning rate for all tasks
REFERENCE = "adam"  # the optimizer that the speed-up is measured against


# ---------------------------------------------------------------------------------- the evaluation


def evaluate(
    optimizers: Sequence[str],
    out: Path,
    *,
    suite: str = "VALID",
    tasks: Sequence[str] | None = None,
    seeds: int = 3,
    tuning_seeds: int = 2,
    workers: int = 1,
    horizon: Sequence[str] = (),
    data: str | None = None,
    steps: int | None = None,
    grids: Mapping[str, tuple[float, ...]] | None = None,
    say: Callable[[str], None] | None = None,
) -> "list[Outcome]":
    """Run all that is missing and measure.

    Args:
        optimizers: names that :func:`optimizer_named` knows, or ``LABEL=NAME``; with ``@all`` after a name one learning
            rate is chosen for all tasks. Adam is always added.
        out: folder; ``runs.jsonl`` in it is appended to.
        suite: ``VALID``, ``HELD_OUT`` or ``package.module:DICT``.
        tasks: names of the suite's tasks; None for all.
        seeds: runs 0 .. seeds-1 of each tuned optimizer on each task.
        tuning_seeds: how many of these choose the learning rate, by their mean final train loss.
        workers: processes, one thread each; 1 runs in this process.
        horizon: horizon speed-ups to measure, each ``LABEL/OPPONENT``, or ``OPPONENT`` for that of every label.
        data: folder of downloaded data sets (also in the workers).
        steps: replaces the horizon of every task.
        grids: other learning-rate grids, by optimizer name.
        say: gets one line a finished run; None for a progress bar, or lines when there is no TTY.

    Raises:
        UnknownName: for a name that does not exist; the message lists those that do.
        BadInput: for two optimizers of one label, a number below 1, or what is no suite.
        TaskError: for a task whose ceiling or a loss is not positive.
        KeyboardInterrupt: after Ctrl-C; ``runs.jsonl`` holds what is finished, call again to go on.
    """
    at_least_one(workers=workers)
    optimizer_named.cache_clear()  # a checkpoint may have been overwritten since the last call
    plan = make_plan(suite, tasks, optimizers, seeds, tuning_seeds, horizon, data, steps, grids)
    return outcomes(plan, carry_out(plan, Path(out), workers=workers, data=data, steps=steps, say=say))


def carry_out(
    plan: Plan,
    out: Path,
    *,
    workers: int = 1,
    data: str | None = None,
    steps: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Runs:
    """Run all of a plan that is missing; arguments as in :func:`evaluate`, ``data`` and ``steps`` as the plan has."""
    store = Store(out / "runs.jsonl")
    store.add_plan(plan)
    with pool(workers) as execute, reporter(say) as report:
        done = partial(_finish, store, execute, report, data, steps)
        done("tuning", tuning_jobs(plan))
        done("final runs", final_jobs(plan, store.runs))
        while jobs := horizon_jobs(plan, store.runs):
            done("shorter horizons", jobs)
    return store.runs


def make_plan(
    suite: str,
    tasks: Sequence[str] | None,
    optimizers: Sequence[str],
    seeds: int,
    tuning_seeds: int,
    horizon: Sequence[str],
    data: str | None,
    steps: int | None,
    grids: Mapping[str, tuple[float, ...]] | None,
) -> Plan:
    """Look up every name; arguments and errors as in :func:`evaluate`."""
    at_least_one(seeds=seeds, tuning_seeds=tuning_seeds, steps=1 if steps is None else steps)
    planned = _planned_optimizers(optimizers, grids or {})
    pairs = [(label, opponent) for label, _, opponent in (spec.rpartition("/") for spec in horizon)]
    for label in {label for pair in pairs for label in pair if label} - planned.keys():
        raise UnknownName(f"--horizon: {label!r} is not evaluated. Valid labels: {', '.join(planned)}.")
    pairs = [(mine, other) for label, other in pairs for mine in ([label] if label else planned) if mine != other]
    infos = {}
    for name in tasks or suite_named(suite, data):
        task = task_named(suite, name, data, steps)
        check_ceiling(task)
        infos[name] = PlannedTask(task.steps, float(task.ceiling), task_fingerprint(task))
    return Plan(suite, infos, planned, seeds, min(tuning_seeds, seeds), tuple(dict.fromkeys(pairs)))


def at_least_one(**counts: int) -> None:
    """Raises BadInput for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise BadInput(f"{name} must be 1 or more, not {count}.")


def _planned_optimizers(
    optimizers: Sequence[str], grids: Mapping[str, tuple[float, ...]]
) -> dict[str, PlannedOptimizer]:
    """By label, the reference first."""
    planned: dict[str, PlannedOptimizer] = {}
    for spec in dict.fromkeys([REFERENCE, *optimizers]):
        labelled = _LABEL.match(spec)
        label, name = (labelled[1], spec[labelled.end() :]) if labelled else (spec, spec)
        if labelled and label in (*OPTIMIZERS, "nfnopt"):
            raise BadInput(f"{spec!r}: the label {label!r} is the name of an optimizer. Choose another label.")
        if label in planned:
            raise BadInput(f"{spec!r}: the label {label!r} is taken by {planned[label].name!r}. Choose another label.")
        shared, name = name.endswith(SHARED), name.removesuffix(SHARED)
        entry, theta = optimizer_named(name)
        grid = grids.get(name, entry.grid)
        if shared and grid is None:
            raise UnknownName(f"{spec!r}: {name} has no learning rate to share among tasks. Leave out {SHARED!r}.")
        planned[label] = PlannedOptimizer(name, theta, grid, shared, entry.told)
    return planned


def job(plan: Plan, task: str, label: str, lr: float | None, seed: int, steps: int) -> Job:
    """The run of a planned optimizer on a planned task."""
    optimizer = plan.optimizers[label]
    fingerprint = plan.tasks[task].fingerprint
    return Job(plan.suite, task, fingerprint, optimizer.name, optimizer.theta, lr, seed, steps)


def tuning_jobs(plan: Plan) -> list[Job]:
    """Every rate of every grid on the tuning seeds."""
    return [
        job(plan, task, label, lr, seed, info.steps)
        for task, info in plan.tasks.items()
        for label, optimizer in plan.optimizers.items()
        if optimizer.grid is not None
        for lr in optimizer.grid
        for seed in range(plan.tuning_seeds)
    ]


def final_jobs(plan: Plan, runs: Runs) -> list[Job]:
    """Every seed at the chosen rate; Adam to ``CAP`` times the steps (its beginning is its run)."""
    chosen = {(task, label): tuned_rate(plan, runs, task, label) for task in plan.tasks for label in plan.optimizers}
    return [
        job(plan, task, label, lr, seed, plan.tasks[task].steps * (CAP if label == REFERENCE else 1))
        for (task, label), lr in chosen.items()
        for seed in range(plan.seeds)
    ]


def tuned_rate(plan: Plan, runs: Runs, task: str, label: str) -> float | None:
    """The rate with the least mean final train loss over the tuning seeds (None: nothing to tune).

    A shared rate is the one for which the logarithm of that loss, a divergence counting as ``DIVERGED`` x ceiling, is
    least in the mean over all tasks. If every rate diverges, the smallest. Raises KeyError while runs are missing.
    """
    optimizer = plan.optimizers[label]
    if optimizer.grid is None:
        return None

    def loss(task: str, lr: float) -> float:
        steps = plan.tasks[task].steps
        keys = [job(plan, task, label, lr, seed, steps).key for seed in range(plan.tuning_seeds)]
        curves = [runs[key] for key in keys]
        return sum(math.inf if c.diverged else c.final_train for c in curves) / len(curves)

    def mean_log(lr: float) -> float:
        worst = {name: DIVERGED * info.ceiling for name, info in plan.tasks.items()}
        return sum(math.log(max(1e-30, min(loss(name, lr), most))) for name, most in worst.items())

    return min(sorted(optimizer.grid), key=mean_log if optimizer.shared else partial(loss, task))


def horizon_jobs(plan: Plan, runs: Runs) -> list[Job]:
    """The next run that each horizon speed-up waits for."""
    searches = [
        search_horizon(plan, runs, task, *pair, seed)
        for task in plan.tasks
        for pair in plan.horizon
        for seed in range(plan.seeds)
    ]
    return [found for found in searches if isinstance(found, Job)]


def search_horizon(plan: Plan, runs: Runs, task: str, label: str, opponent: str, seed: int) -> "float | Job":
    """The horizon speed-up, or the run that has to be done to know it: bisection, as longer runs get further.

    Over an opponent that diverged it is that of the shortest run that does not; 0 where both diverge.
    """
    other = final_curve(plan, runs, task, opponent, seed)
    target = math.inf if other.diverged else other.final_train
    if not plan.optimizers[label].told:
        return _search_curve(plan, runs, task, label, seed, target)
    lr = tuned_rate(plan, runs, task, label)
    losses: dict[float, float] = {}
    low, high, k = -1, len(HORIZONS), HORIZONS.index(1.0)  # low does not reach the target, high does
    while high - low > 1:
        if HORIZONS[k] == 1:
            curve = final_curve(plan, runs, task, label, seed)
        else:
            needed = job(plan, task, label, lr, seed, max(1, round(HORIZONS[k] * plan.tasks[task].steps)))
            if needed.key not in runs:
                return needed
            curve = runs[needed.key]
        losses[HORIZONS[k]] = math.inf if curve.diverged else curve.final_train
        low, high = (low, k) if reaches(losses[HORIZONS[k]], target) else (k, high)
        k = (low + high + 1) // 2
    return horizon_speed_up(losses, target)


def _search_curve(plan: Plan, runs: Runs, task: str, label: str, seed: int, target: float) -> "float | Job":
    """As :func:`search_horizon`, for an optimizer that is not told a horizon: one run tells of all shorter ones."""
    steps = plan.tasks[task].steps
    for multiple in (1, round(HORIZONS[-1])):
        needed = job(plan, task, label, None, seed, multiple * steps)
        if needed.key not in runs:
            return needed
        curve = runs[needed.key]
        if math.isinf(target) and curve.diverged:  # its beginning is below infinity all the same
            return 0.0
        at = first_reaching(curve, target)
        if at is not None:
            return min(HORIZON_CAP, steps / max(at, HORIZONS[0] * steps))
    return 0.0


def final_curve(plan: Plan, runs: Runs, task: str, label: str, seed: int) -> Curve:
    """The run at the chosen rate and the task's own length. Raises KeyError while it is missing."""
    info = plan.tasks[task]
    lr = tuned_rate(plan, runs, task, label)
    if label == REFERENCE:
        long = runs[job(plan, task, label, lr, seed, CAP * info.steps).key]
        return long.until(info.steps, info.ceiling)
    return runs[job(plan, task, label, lr, seed, info.steps).key]


def _cells(plan: Plan) -> Iterator[tuple[str, str, int]]:
    for task in plan.tasks:
        for label in plan.optimizers:
            for seed in range(plan.seeds):
                yield task, label, seed


# ------------------------------------------------------------------------------------ running jobs


def work(job: Job, data: str | None, steps: int | None) -> tuple[Job, Curve]:
    """Do one job on one thread; everything is rebuilt from names (cached per process)."""
    entry, theta = optimizer_named(job.optimizer)
    if theta != job.theta:
        raise RuntimeError(
            f"{job.optimizer} changed while it was evaluated (its file was overwritten?). "
            "Evaluate a copy of the checkpoint."
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = task_named(job.suite, job.task, data, steps)
        told = {"symmetry": symmetry_of(task)} if entry.grid is None else {}
        return job, run(task, partial(entry.factory, lr=job.lr, **told), job.seed, job.steps)
    finally:
        torch.set_num_threads(threads)


J = TypeVar("J")
R = TypeVar("R")


class Execute(Protocol):
    """A map over jobs of any kind."""

    def __call__(self, function: Callable[[J], R], jobs: Sequence[J], /) -> Iterator[R]:
        """The results, as they finish."""


@contextmanager
def pool(workers: int) -> Iterator[Execute]:
    """A map over jobs, results as they finish; on an exception all workers stop at once."""
    if workers == 1:
        yield map
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _worker)

    def execute(function: Callable[[J], R], jobs: Sequence[J], /) -> Iterator[R]:
        for future in as_completed([executor.submit(function, job) for job in jobs]):
            yield future.result()

    try:
        yield execute
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    executor.shutdown()


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Else the workers of a parent that was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _finish(store: Store, execute: Execute, report, data, steps, stage: str, jobs: list[Job]) -> None:
    """Do those of the jobs that are not in the store."""
    unique = {job.key: job for job in jobs if job.key not in store.runs}
    report.start(stage, len(unique), len({job.key for job in jobs}))
    longest_first = sorted(unique.values(), key=lambda job: -job.steps)
    for job, curve in execute(partial(work, data=data, steps=steps), longest_first):
        store.add(job, curve)
        report.line(job, curve)


class Reporter:
    """A rich progress bar, or a plain line a run where there is no terminal."""

    def __init__(self, say: Callable[[str], None], bar: Any = None) -> None:
        self.say, self.bar, self.task = say, bar, None
        self.stage, self.count, self.total = "", 0, 0

    def start(self, stage: str, todo: int, total: int) -> None:
        self.stage, self.count, self.total = stage, 0, todo
        if self.bar is not None:
            self.task = self.bar.add_task(stage, total=todo)
        elif todo < total:
            self.say(f"{stage}: {total - todo} of {total} runs are already there")

    def line(self, job: Job, curve: Curve) -> None:
        self.count += 1
        rate = "" if job.lr is None else f" lr {job.lr:g}"
        loss = "diverged" if curve.diverged else f"train loss {curve.final_train:.4g}"
        text = f"{job.task} {job.optimizer}{rate} seed {job.seed} {job.steps} steps: {loss}"
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=f"{self.stage}  {text}")
        else:
            self.say(f"[{self.stage} {self.count}/{self.total}] {text} ({curve.seconds:.1f} s)")


@contextmanager
def reporter(say: Callable[[str], None] | None) -> Iterator[Reporter]:
    """A reporter that calls ``say``, draws a bar, or prints."""
    if say is not None:
        yield Reporter(say)
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    if not console.is_terminal:
        yield Reporter(partial(print, flush=True))
        return
    with Progress(console=console) as bar:
        yield Reporter(bar.console.print, bar)


# ---------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class Outcome:
    """The measures of one optimizer on one task and seed."""

    optimizer: str
    task: str
    seed: int
    lr: float | None
    at_edge: bool  # the chosen rate is the first or last of its grid
    curve: Curve
    speed_up: float  # over LR-tuned constant-rate Adam; 0 = diverged
    capped: bool  # Adam did not get there in CAP times the steps: speed_up is CAP, "6+"
    loss_ratio: float  # tuned Adam's final train loss / this one's
    horizon_speed_ups: dict[str, float]  # opponent -> over it, where it is asked for and no runs are missing


def outcomes(plan: Plan, runs: Runs) -> list[Outcome]:
    """All outcomes whose runs are in the store: every one, unless it was interrupted."""
    found = []
    for task, label, seed in _cells(plan):
        try:
            found.append(_outcome(plan, runs, task, label, seed))
        except KeyError:  # a run that is not there yet
            continue
    return found


def _outcome(plan: Plan, runs: Runs, task: str, label: str, seed: int) -> Outcome:
    info = plan.tasks[task]
    lr = tuned_rate(plan, runs, task, label)
    curve = final_curve(plan, runs, task, label, seed)
    adam_rate = tuned_rate(plan, runs, task, REFERENCE)
    adam_long = runs[job(plan, task, REFERENCE, adam_rate, seed, CAP * info.steps).key]
    adam_final = adam_long.until(info.steps, info.ceiling).final_train
    factor, capped = speed_up(adam_long, curve)
    opponents = [other for mine, other in plan.horizon if mine == label]
    reached = {other: search_horizon(plan, runs, task, label, other, seed) for other in opponents}
    horizon = {other: found for other, found in reached.items() if not isinstance(found, Job)}
    grid = plan.optimizers[label].grid
    at_edge = grid is not None and len(grid) > 1 and lr in (min(grid), max(grid))
    ratio = loss_ratio(adam_final, curve, info.ceiling)
    return Outcome(label, task, seed, lr, at_edge, curve, factor, capped, ratio, horizon)
