"""Optimizers x tasks x seeds -> curves -> measures, in ordinary ``torch.optim`` loops.

    plan -> tuning runs (learning-rate grids) -> runs at the chosen rate, Adam to 6x -> outcomes

Every finished run is one line of ``runs.jsonl``; a run that is already there is never repeated, so
an interrupted evaluation goes on where it stopped and a second one pays only for what is new.
"""

import copy
import importlib
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_train.optimizers import (
    MakeOptimizer,
    UnknownName,
    digest,
    load_weights,
    optimizer_named,
)
from meta_train.symmetries import symmetry_of

POINTS = 50  # evaluation points of a run of the task's own length
EVAL_BATCHES = 8  # examples of an evaluation, in training batches
CAP = 6  # Adam is run on to CAP times the steps; a speed-up is at most CAP
DIVERGED = 3.0  # a final train loss above DIVERGED x ceiling counts as divergence
HORIZONS = (1.0, 0.8, 0.67, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1)
SHARED = "@all"  # after an optimizer's name: one learning rate for all tasks
REFERENCE = "adam"  # the optimizer that the speed-up is measured against


# ----------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Curve:
    """What one run measured. ``train`` and ``held_out`` are losses (nats or squared error) at the
    steps ``at``, infinite from divergence on; ``seconds`` is the wall clock of the training steps
    alone, ``cpu_seconds`` their processor time (which other processes on the machine do not
    stretch), ``ran`` how many of them were taken."""

    at: list[int]
    train: list[float]
    held_out: list[float]
    seconds: float
    cpu_seconds: float
    ran: int
    diverged: bool

    @property
    def final_train(self) -> float:
        return self.train[-1]

    @property
    def final_held_out(self) -> float:
        return self.held_out[-1]

    @property
    def best_held_out(self) -> float:
        return min(self.held_out)

    def until(self, steps: int, ceiling: float) -> "Curve":
        """The first ``steps`` steps: what a shorter run would measure (at a constant rate)."""
        n = self.at.index(steps) + 1
        ran = min(self.ran, steps)
        train = self.train[:n]
        part = ran / max(self.ran, 1)
        return Curve(
            at=self.at[:n],
            train=train,
            held_out=self.held_out[:n],
            seconds=part * self.seconds,
            cpu_seconds=part * self.cpu_seconds,
            ran=ran,
            diverged=_bad(train[-1], ceiling),
        )


def run(task: Any, make_optimizer: MakeOptimizer, seed: int, steps: int) -> Curve:
    """Train ``task.model`` for ``steps`` steps with an optimizer, in the loop that users write.

    For a given task and seed the initial weights and the order of the data are the same for every
    optimizer, whatever the number of steps.

    Args:
        task: see ``tasks.task.Task``.
        make_optimizer: ``(model, steps=steps) -> (optimizer, scheduler or None)``.
        seed: of the initial weights and the data.
        steps: how many steps to take; also the horizon that the optimizer is told.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(task.model).train()
    load_weights(model, task.init(generator))
    optimizer, scheduler = make_optimizer(model, steps=steps)
    params = dict(model.named_parameters())
    evals = evaluation_batches(task)

    at = evaluation_steps(steps, task.steps)
    train, held_out = [], []
    seconds, cpu_seconds, ran, finite = 0.0, 0.0, 0, True
    for previous, now in zip([0, *at], at, strict=False):
        _switch(optimizer, "train")
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(previous, now):
            batch = task.batch(generator)
            optimizer.zero_grad()
            loss = task.loss(params, batch)
            finite = bool(loss.isfinite())
            if not finite:
                break
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            ran += 1
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
        _switch(optimizer, "eval")
        if finite:
            with torch.no_grad():
                measured = [float(task.loss(params, batch)) for batch in evals]
            finite = math.isfinite(measured[0])
        if not finite:
            break
        train.append(measured[0])
        held_out.append(measured[1] if math.isfinite(measured[1]) else math.inf)
    missing = [math.inf] * (len(at) - len(train))
    train, held_out = train + missing, held_out + missing
    diverged = _bad(train[-1], task.ceiling)
    return Curve(at, train, held_out, seconds, cpu_seconds, ran, diverged)


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Schedule-Free optimizers keep other weights in training than those that are to be measured."""
    getattr(optimizer, mode, lambda: None)()


def evaluation_batches(task: Any) -> list[tuple[Tensor, ...]]:
    """The task's fixed train and held-out batches, cut to evenly spaced examples.

    ``EVAL_BATCHES`` training batches of examples, but 256 at least: all of them would cost several
    times the training where a batch is a few sequences.
    """
    batch_size = len(task.batch(torch.Generator().manual_seed(0))[0])
    most = max(256, EVAL_BATCHES * batch_size)

    def cut(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n = len(batch[0])
        if n <= most:
            return batch
        rows = torch.arange(most) * n // most
        return tuple(part[rows] for part in batch)

    return [cut(task.train_eval()), cut(task.held_out())]


def evaluation_steps(steps: int, horizon: int) -> list[int]:
    """Steps at which a run is measured: 0, the last, and ``POINTS`` a horizon in between.

    A run beyond ``horizon`` keeps the spacing, so that its beginning has the points of a short run.
    """
    every = max(1.0, min(steps, horizon) / POINTS)
    return sorted({min(steps, round(k * every)) for k in range(math.ceil(steps / every) + 1)})


def _bad(loss: float, ceiling: float) -> bool:
    return not loss <= DIVERGED * ceiling


# --------------------------------------------------------------------------------------- the tasks


def suite_named(name: str, data: str | None = None) -> Mapping[str, Callable[[], Any]]:
    """``VALID`` or ``HELD_OUT`` of ``tasks.suites``, or any ``package.module:DICT`` of tasks.

    ``HELD_OUT`` has more tasks if the folder ``data`` holds the data for them.
    """
    module, _, attribute = name.rpartition(":")
    if module:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            raise UnknownName(f"no suite {name!r}: {error}. Valid: VALID, HELD_OUT.") from None
    from tasks import suites

    if name == "HELD_OUT":
        return suites.held_out(data)
    if name == "VALID":
        return suites.VALID
    raise UnknownName(f"unknown suite {name!r}. Valid suites: VALID, HELD_OUT, or package.module:DICT.")


@lru_cache(maxsize=64)
def task_named(suite: str, name: str, data: str | None = None, steps: int | None = None) -> Any:
    """Build a task of a suite; ``steps`` replaces its own horizon."""
    table = suite_named(suite, data)
    if name not in table:
        raise UnknownName(f"unknown task {name!r} in {suite}. Valid tasks: {', '.join(table)}.")
    task = table[name]()
    if steps is not None:
        task = copy.copy(task)
        task.steps = steps
    return task


def task_fingerprint(task: Any) -> str:
    """Hash of the model, its initial weights, the data and the horizon of a task."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(task.init(generator))
    batches = {"batch": task.batch(generator), "train": task.train_eval(), "held": task.held_out()}
    for name, batch in batches.items():
        tensors |= {f"{name}.{k}": tensor for k, tensor in enumerate(batch)}
    return digest((task.model, task.steps, task.ceiling), tensors)


# ---------------------------------------------------------------------------- plan, jobs and store


@dataclass(frozen=True)
class PlannedTask:
    """A task by name, and what identifies its present content."""

    steps: int
    ceiling: float
    fingerprint: str


@dataclass(frozen=True)
class PlannedOptimizer:
    """An optimizer by name, what identifies it if it is learned, its learning rates, and whether one for all tasks."""

    name: str
    theta: str
    grid: tuple[float, ...] | None
    shared: bool = False

    @property
    def rates(self) -> tuple[float | None, ...]:
        return self.grid or (None,)


@dataclass(frozen=True)
class Plan:
    """What an evaluation is to measure: enough to tell from the store what is there and missing.

    The tuning seeds are the first of the seeds: tuned baselines choose their rate on runs that also
    count, which favours them and nobody else.
    """

    suite: str
    tasks: dict[str, PlannedTask]
    optimizers: dict[str, PlannedOptimizer]  # label -> optimizer
    seeds: int
    tuning_seeds: int
    horizon: str | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        tasks = {name: PlannedTask(**t) for name, t in data["tasks"].items()}
        optimizers = {
            label: PlannedOptimizer(**{**o, "grid": tuple(o["grid"]) if o["grid"] else None})
            for label, o in data["optimizers"].items()
        }
        return cls(**{**data, "tasks": tasks, "optimizers": optimizers})


@dataclass(frozen=True)
class Job:
    """One run, by names alone: a worker process builds the task and the optimizer from them."""

    suite: str
    task: str
    fingerprint: str
    optimizer: str
    theta: str
    lr: float | None
    seed: int
    steps: int

    @property
    def key(self) -> tuple:
        # A learned optimizer is what it does (theta), not the path it was loaded from.
        name = "learned" if self.theta else self.optimizer
        return (self.suite, self.task, self.fingerprint, name, self.theta, self.lr, self.seed) + (self.steps,)


Runs = dict[tuple, Curve]


@dataclass
class Store:
    """``runs.jsonl``: one line a plan or a finished run, only ever appended to."""

    path: Path
    runs: Runs = field(default_factory=dict)
    plan: Plan | None = None

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off by a crash: that run is done again
                continue
            if "plan" in record:
                self.plan = Plan.from_dict(record["plan"])
            else:
                self.runs[Job(**record["job"]).key] = _curve_from(record["curve"])

    def add_plan(self, plan: Plan) -> None:
        self.plan = plan
        self._append({"plan": asdict(plan)})

    def add(self, job: Job, curve: Curve) -> None:
        self.runs[job.key] = curve
        values = {**asdict(curve), "train": _finite(curve.train)}
        self._append({"job": asdict(job), "curve": {**values, "held_out": _finite(curve.held_out)}})

    def _append(self, record: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell() > 0:  # a line that a crash cut off must not swallow this one
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")


def _finite(losses: list[float]) -> list[float | None]:
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in losses]


def _curve_from(data: dict[str, Any]) -> Curve:
    losses = {k: [math.inf if x is None else x for x in data[k]] for k in ("train", "held_out")}
    return Curve(**{**data, **losses})


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
    horizon: str | None = None,
    data: str | None = None,
    steps: int | None = None,
    grids: Mapping[str, tuple[float, ...]] | None = None,
    say: Callable[[str], None] | None = None,
) -> "list[Outcome]":
    """Run all that is missing and measure.

    Args:
        optimizers: names of ``OPTIMIZERS``, ``nfn:RULE``, or ``LABEL=NAME``; with ``@all`` after the name one
            learning rate is chosen for all tasks. Adam is always added.
        out: folder; ``runs.jsonl`` in it is appended to.
        suite: ``VALID``, ``HELD_OUT`` or ``package.module:DICT``.
        tasks: names of the suite's tasks; None for all.
        seeds: runs 0 .. seeds-1 of each tuned optimizer on each task.
        tuning_seeds: how many of these choose the learning rate, by their mean final train loss.
        workers: processes, one thread each; 1 runs in this process.
        horizon: label of the opponent for the horizon speed-up; None leaves it out.
        data: folder of downloaded data sets (also in the workers).
        steps: replaces the horizon of every task.
        grids: other learning-rate grids, by optimizer name.
        say: gets one line a finished run; None for a progress bar, or lines when there is no TTY.

    Raises:
        UnknownName: for a name that does not exist; the message lists those that do.
        KeyboardInterrupt: after Ctrl-C; ``runs.jsonl`` holds what is finished, call again to go on.
    """
    optimizer_named.cache_clear()  # a checkpoint may have been overwritten since the last call
    plan = make_plan(suite, tasks, optimizers, seeds, tuning_seeds, horizon, data, steps, grids)
    store = Store(Path(out) / "runs.jsonl")
    store.add_plan(plan)
    with pool(workers) as execute, reporter(say) as report:
        done = partial(_finish, store, execute, report, data, steps)
        done("tuning", tuning_jobs(plan))
        done("final runs", final_jobs(plan, store.runs))
        while plan.horizon is not None and (jobs := horizon_jobs(plan, store.runs)):
            done("shorter horizons", jobs)
    return outcomes(plan, store.runs)


def make_plan(
    suite: str,
    tasks: Sequence[str] | None,
    optimizers: Sequence[str],
    seeds: int,
    tuning_seeds: int,
    horizon: str | None,
    data: str | None,
    steps: int | None,
    grids: Mapping[str, tuple[float, ...]] | None,
) -> Plan:
    """Look up every name; arguments and errors as in :func:`evaluate`."""
    if seeds < 1 or tuning_seeds < 1:
        raise ValueError(f"seeds and tuning_seeds must be 1 or more, got {seeds}, {tuning_seeds}.")
    planned: dict[str, PlannedOptimizer] = {}
    for spec in [REFERENCE, *optimizers]:
        label, _, name = spec.rpartition("=")
        label, shared, name = label or name, name.endswith(SHARED), name.removesuffix(SHARED)
        entry, theta = optimizer_named(name)
        grid = (grids or {}).get(name, entry.grid)
        if shared and grid is None:
            raise UnknownName(f"{spec!r}: {name} has no learning rate to share among tasks. Leave out {SHARED!r}.")
        planned[label] = PlannedOptimizer(name, theta, grid, shared)
    if planned[REFERENCE].name != REFERENCE:
        raise ValueError(f"the label {REFERENCE!r} is taken: all speed-ups are measured against it.")
    if horizon is not None and horizon not in planned:
        raise UnknownName(f"horizon opponent {horizon!r} is not evaluated. Valid labels: {', '.join(planned)}.")
    infos = {}
    for name in tasks or suite_named(suite, data):
        task = task_named(suite, name, data, steps)
        infos[name] = PlannedTask(task.steps, float(task.ceiling), task_fingerprint(task))
    return Plan(suite, infos, planned, seeds, min(tuning_seeds, seeds), horizon)


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
    """The next run that each horizon speed-up waits for: fractions from the smallest up."""
    jobs = []
    for task, label, seed in _cells(plan):
        if label != plan.horizon:
            found = _search_horizon(plan, runs, task, label, seed)
            if isinstance(found, Job):
                jobs.append(found)
    return jobs


def _search_horizon(plan: Plan, runs: Runs, task: str, label: str, seed: int) -> "float | Job":
    """The horizon speed-up, or the run that has to be done to know it."""
    assert plan.horizon is not None
    target = final_curve(plan, runs, task, plan.horizon, seed).final_train
    lr = tuned_rate(plan, runs, task, label)
    for fraction in sorted(HORIZONS):
        steps = max(1, round(fraction * plan.tasks[task].steps))
        needed = job(plan, task, label, lr, seed, steps)
        curve = runs.get(needed.key)
        if curve is None:
            return needed
        if not curve.diverged and curve.final_train <= target:
            return 1 / fraction
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


Execute = Callable[[Callable, Sequence[Job]], Iterator[tuple[Job, Curve]]]


@contextmanager
def pool(workers: int) -> Iterator[Execute]:
    """A map over jobs, results as they finish; on an exception all workers stop at once."""
    if workers == 1:
        yield lambda function, jobs: map(function, jobs)
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _worker)

    def execute(function: Callable, jobs: Sequence[Job]) -> Iterator[tuple[Job, Curve]]:
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
    horizon_speed_up: float | None  # None: not asked for, or runs are missing


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
    horizon = None
    if plan.horizon is not None and label != plan.horizon:
        reached = _search_horizon(plan, runs, task, label, seed)
        horizon = None if isinstance(reached, Job) else reached
    grid = plan.optimizers[label].grid
    at_edge = grid is not None and len(grid) > 1 and lr in (min(grid), max(grid))
    ratio = loss_ratio(adam_final, curve, info.ceiling)
    return Outcome(label, task, seed, lr, at_edge, curve, factor, capped, ratio, horizon)


def speed_up(adam_long: Curve, curve: Curve) -> tuple[float, bool]:
    """``(steps Adam needs to reach curve's final train loss / curve's steps, never reached)``.

    Adam's curve is smoothed (median of three points), made a running minimum and interpolated
    between the evaluation points; where it never arrives the value is ``CAP``; divergence is 0.
    """
    if curve.diverged:
        return 0.0, False
    best = np.minimum.accumulate(_median_of_three(np.array(adam_long.train)))
    target = curve.final_train
    if not best[-1] <= target:
        return float(CAP), True
    k = int(np.argmax(best <= target))
    step = float(adam_long.at[k])
    if k > 0:
        done = (best[k - 1] - target) / (best[k - 1] - best[k])
        step = adam_long.at[k - 1] + done * (adam_long.at[k] - adam_long.at[k - 1])
    return min(float(CAP), step / curve.at[-1]), False


def _median_of_three(x: np.ndarray) -> np.ndarray:
    padded = np.concatenate([x[:1], x, x[-1:]])
    return np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def loss_ratio(adam_final: float, curve: Curve, ceiling: float) -> float:
    """Tuned Adam's final train loss over the optimizer's; above 1 beats Adam, 0 is diverged."""
    if curve.diverged:
        return 0.0
    return min(adam_final, DIVERGED * ceiling) / max(curve.final_train, 1e-30)


def iqm(values: Any, axis: int = 0) -> Any:
    """Interquartile mean: the mean of the middle half."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def iqm_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """95 % interval of the IQM over all values, by a bootstrap of the seeds within each task.

    None with fewer than two seeds on some task, where there is nothing to resample.
    """
    from scipy.stats import bootstrap

    if min(map(len, strata)) < 2:
        return None
    values = np.concatenate([np.asarray(s) for s in strata])
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    interval = bootstrap(
        [np.asarray(s) for s in strata],
        lambda *samples, axis: iqm(np.concatenate(samples, axis=axis), axis=axis),
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
