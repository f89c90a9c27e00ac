"""Optimizers x tasks x seeds -> curves -> measures, in ordinary ``torch.optim`` loops.

    plan -> tuning runs (learning-rate grids) -> runs at the chosen rate, Adam to 6x -> horizon searches
         -> CPU seconds of a step, all optimizers in turns -> outcomes

Every finished run is one line of ``runs.jsonl``; a run that is already there is never repeated, so
an interrupted evaluation goes on where it stopped and a second one pays only for what is new.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from learned_opt.symmetry import Symmetry
from meta_train.bench.curves import CAP, Curve, run
from meta_train.bench.jobs import do_missing, job_progress, one_thread, pool
from meta_train.bench.optimizers import OPTIMIZERS, MakeOptimizer, optimizer_named
from meta_train.bench.outcomes import REFERENCE, Outcome, job, outcomes, search_horizon, timing_job, tuned_rate
from meta_train.bench.store import Job, Plan, PlannedOptimizer, PlannedTask, Runs, Store
from meta_train.bench.suites import source_of, suite_named, task_fingerprint, task_named
from meta_train.bench.timing import Contender, TimingJob, Timings, TimingStore, time_steps
from meta_train.errors import UnknownName, UsageError, at_least_one
from meta_train.symmetries import inferred_symmetry, symmetry_of
from tasks.task import check_ceiling

_LABEL = re.compile("([^=:@]+)=")  # but for nfn:RULE@lr=0.3
SHARED = "@all"  # after an optimizer's name: one learning rate for all tasks


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
        optimizers: names that ``optimizer_named`` knows, or ``LABEL=NAME``; with ``@all`` after a name one learning
            rate is chosen for all tasks. Adam is always added.
        out: folder; ``runs.jsonl`` in it is appended to.
        suite: a name of ``tasks.suites.SUITES``, ``package.module:DICT`` or ``FILE.py:DICT``.
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
        UsageError: for two optimizers of one label, a number below 1, or what is no suite.
        TaskError: for a task whose ceiling or a loss is not positive.
        KeyboardInterrupt: after Ctrl-C; ``runs.jsonl`` holds what is finished, call again to go on.
    """
    at_least_one(workers=workers)
    optimizer_named.cache_clear()  # a checkpoint may have been overwritten since the last call
    plan = make_plan(suite, tasks, optimizers, seeds, tuning_seeds, horizon, data, steps, grids)
    runs = carry_out(plan, Path(out), workers=workers, data=data, steps=steps, say=say)
    return outcomes(plan, runs, TimingStore(Path(out) / "runs.jsonl"))


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
    with pool(workers) as execute, job_progress(say) as progress:

        def do(stage: str, jobs: list[Job]) -> None:
            longest_first = sorted(jobs, key=lambda job: -job.steps)
            do_missing(stage, longest_first, partial(work, data=data, steps=steps), store, execute, progress)

        do("tuning", tuning_jobs(plan))
        do("final runs", final_jobs(plan, store.runs))
        while jobs := horizon_jobs(plan, store.runs):
            do("shorter horizons", jobs)
        timings = TimingStore(store.path)
        unknown = [job for task in plan.tasks if timings.of(job := timing_job(plan, store.runs, task)) is None]
        do_missing("seconds a step", unknown, partial(time_job, data=data, steps=steps), timings, execute, progress)
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
        source = source_of(suite, name, data)
        infos[name] = PlannedTask(task.steps, float(task.ceiling), task_fingerprint(task), source)
    return Plan(suite, infos, planned, seeds, min(tuning_seeds, seeds), tuple(dict.fromkeys(pairs)))


def _planned_optimizers(
    optimizers: Sequence[str], grids: Mapping[str, tuple[float, ...]]
) -> dict[str, PlannedOptimizer]:
    """By label, the reference first."""
    planned: dict[str, PlannedOptimizer] = {}
    for spec in dict.fromkeys([REFERENCE, *optimizers]):
        labelled = _LABEL.match(spec)
        label, name = (labelled[1], spec[labelled.end() :]) if labelled else (spec, spec)
        if labelled and label in (*OPTIMIZERS, "nfnopt"):
            raise UsageError(f"{spec!r}: the label {label!r} is the name of an optimizer. Choose another label.")
        if label in planned:
            other = planned[label].name
            raise UsageError(f"{spec!r}: the label {label!r} is taken by {other!r}. Choose another label.")
        shared, name = name.endswith(SHARED), name.removesuffix(SHARED)
        entry, theta = optimizer_named(name)
        grid = grids.get(name, entry.grid)
        if shared and grid is None:
            raise UnknownName(f"{spec!r}: {name} has no learning rate to share among tasks. Leave out {SHARED!r}.")
        planned[label] = PlannedOptimizer(name, theta, grid, shared, entry.with_total_steps)
    return planned


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


def horizon_jobs(plan: Plan, runs: Runs) -> list[Job]:
    """The next run that each horizon speed-up waits for."""
    searches = [
        search_horizon(plan, runs, task, *pair, seed)
        for task in plan.tasks
        for pair in plan.horizon
        for seed in range(plan.seeds)
    ]
    return [found for found in searches if isinstance(found, Job)]


# ------------------------------------------------------------------------------------ running jobs


def work(job: Job, data: str | None, steps: int | None) -> Curve:
    """Do one run on one thread; everything is rebuilt from names (cached per process)."""
    with one_thread():
        task = task_named(job.suite, job.task, data, steps)
        make, _ = _maker(Contender(job.optimizer, job.theta, job.lr), lambda: symmetry_of(task))
        return run(task, make, job.seed, job.steps)


def time_job(job: TimingJob, data: str | None, steps: int | None) -> Timings:
    """Measure the seconds of a step of all contenders, on one thread; the first steps include symmetry inference."""
    with one_thread():
        task = task_named(job.suite, job.task, data, steps)
        start = time.process_time()
        symmetry = inferred_symmetry(task)
        inference = time.process_time() - start
        makers = {c.identity: _maker(c, lambda: symmetry) for c in job.contenders}
        found = time_steps(task, {name: make for name, (make, _) in makers.items()})
        return {n: replace(s, first=s.first + inference) if makers[n][1] else s for n, s in found.items()}


def _maker(contender: Contender, symmetry: Callable[[], Symmetry]) -> tuple[MakeOptimizer, bool]:
    """The factory of an optimizer at its rate, and whether it is given the symmetry."""
    entry, theta = optimizer_named(contender.optimizer)
    if theta != contender.theta:
        raise RuntimeError(
            f"{contender.optimizer} changed while it was evaluated (its file was overwritten?). "
            "Evaluate a copy of the checkpoint."
        )
    known = {"symmetry": symmetry()} if entry.grid is None else {}
    return partial(entry.factory, lr=contender.lr, **known), bool(known)
