"""Runs -> the measures of an evaluation: chosen rates, horizon searches, one outcome an optimizer, task and seed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from meta_train.bench.curves import (
    CAP,
    DIVERGED,
    Curve,
    first_reaching,
    horizon_speed_up,
    iqm,
    loss_ratio,
    reaches,
    speed_up,
)
from meta_train.bench.store import Job, Plan, Runs
from meta_train.bench.timing import Contender, StepSeconds, TimingJob, TimingStore

HORIZONS = (0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5, 0.67, 0.8, 1.0, 1.25, 1.6, 2.0)  # times a task's own steps
HORIZON_CAP = 1 / HORIZONS[0]  # the largest horizon speed-up
REFERENCE = "adam"  # the optimizer that the speed-up is measured against


# ------------------------------------------------------------------------------- runs of the plan


def job(plan: Plan, task: str, label: str, lr: float | None, seed: int, steps: int) -> Job:
    """The run of a planned optimizer on a planned task."""
    optimizer = plan.optimizers[label]
    fingerprint = plan.tasks[task].fingerprint
    return Job(plan.suite, task, fingerprint, optimizer.name, optimizer.theta, lr, seed, steps)


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


def search_horizon(plan: Plan, runs: Runs, task: str, label: str, opponent: str, seed: int) -> "float | Job":
    """The horizon speed-up, or the run that has to be done to know it: bisection, as longer runs get further.

    Over an opponent that diverged it is that of the shortest run that does not; 0 where both diverge.
    """
    other = final_curve(plan, runs, task, opponent, seed)
    target = math.inf if other.diverged else other.final_train
    if not plan.optimizers[label].with_total_steps:
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
    """As :func:`search_horizon`, for an optimizer without ``total_steps``: one run tells of all shorter ones."""
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
    seconds: StepSeconds | None = None  # of a training step, if they were measured
    time_speed_up: float | None = None  # as speed_up, in CPU seconds
    time_speed_ups: dict[str, float] = field(default_factory=dict)  # as horizon_speed_ups, in CPU seconds


def outcomes(plan: Plan, runs: Runs, timings: TimingStore | None = None) -> list[Outcome]:
    """All outcomes whose runs are in the store: every one, unless it was interrupted."""
    seconds = {task: step_seconds(plan, runs, task, timings) for task in plan.tasks} if timings else {}
    found = []
    for task, label, seed in _cells(plan):
        try:
            found.append(_outcome(plan, runs, task, label, seed, seconds.get(task, {})))
        except KeyError:  # a run that is not there yet
            continue
    return found


def _outcome(
    plan: Plan, runs: Runs, task: str, label: str, seed: int, seconds: Mapping[str, StepSeconds]
) -> Outcome:
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
    mine = seconds.get(label)
    timed = {other: x for other, x in horizon.items() if other in seconds}
    in_time = {other: time_speed_up(x, mine, seconds[other]) for other, x in timed.items()} if mine else {}
    over_adam = time_speed_up(factor, mine, seconds[REFERENCE]) if mine and REFERENCE in seconds else None
    return Outcome(
        label,
        task,
        seed,
        lr,
        at_edge,
        curve,
        factor,
        capped,
        ratio,
        horizon,
        mine,
        over_adam,
        in_time,
    )


def time_speed_up(in_steps: float, mine: StepSeconds, other: StepSeconds) -> float:
    """CPU seconds of the other's whole run over those that the optimizer needs to its final loss.

    Args:
        in_steps: the other's steps over those that the optimizer needs.
        mine: of a step of the optimizer.
        other: of a step of the other.
    """
    return in_steps * other.whole / mine.whole


# ------------------------------------------------------------------------------------------- seconds


def timing_job(plan: Plan, runs: Runs, task: str) -> TimingJob:
    """All optimizers of the plan on a task, each at its chosen rate. Raises KeyError while tuning runs are missing."""
    planned = {label: _contender(plan, runs, task, label) for label in plan.optimizers}
    unlike = {c.identity: c for c in planned.values()}  # two labels may stand for one optimizer at one rate
    return TimingJob(plan.suite, task, plan.tasks[task].fingerprint, tuple(unlike.values()))


def _contender(plan: Plan, runs: Runs, task: str, label: str) -> Contender:
    optimizer = plan.optimizers[label]
    return Contender(optimizer.name, optimizer.theta, tuned_rate(plan, runs, task, label))


def step_seconds(plan: Plan, runs: Runs, task: str, timings: TimingStore) -> dict[str, StepSeconds]:
    """By label; empty while they are not measured, without those whose loss became infinite."""
    try:
        found = timings.of(timing_job(plan, runs, task)) or {}
    except KeyError:
        return {}
    identities = {label: _contender(plan, runs, task, label).identity for label in plan.optimizers}
    return {label: found[i] for label, i in identities.items() if i in found}


def _cells(plan: Plan) -> Iterator[tuple[str, str, int]]:
    for task in plan.tasks:
        for label in plan.optimizers:
            for seed in range(plan.seeds):
                yield task, label, seed


# --------------------------------------------------------------------------------- groups of outcomes


def of_label(found: Sequence[Outcome], label: str) -> list[Outcome]:
    """Those of one optimizer."""
    return [o for o in found if o.optimizer == label]


def ranked(plan: Plan, found: Sequence[Outcome]) -> list[str]:
    """Labels that have outcomes, by falling speed-up, then loss ratio."""

    def rank(label: str) -> tuple[float, float]:
        mine = of_label(found, label)
        return -iqm([o.speed_up for o in mine]), -iqm([o.loss_ratio for o in mine])

    return sorted((label for label in plan.optimizers if of_label(found, label)), key=rank)


def by_task(mine: Sequence[Outcome], measure: Callable[[Outcome], float]) -> list[list[float]]:
    """A measure: a list for each task, of its seeds."""
    groups: dict[str, list[float]] = {}
    for outcome in mine:
        groups.setdefault(outcome.task, []).append(measure(outcome))
    return list(groups.values())
