"""What an evaluation of optimizers is to do and what is done: the plan, its jobs, and ``runs.jsonl``."""

import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meta_train import jsonl
from meta_train.bench import jobs
from meta_train.bench.curves import Curve


@dataclass(frozen=True)
class PlannedTask:
    """A task by name, and what identifies its present content."""

    steps: int
    ceiling: float
    fingerprint: str
    source: str = ""  # what its data are called, where they depend on the data folder


@dataclass(frozen=True)
class PlannedOptimizer:
    """An optimizer by name, what identifies it if it is learned, its learning rates, and whether one for all tasks."""

    name: str
    theta: str
    grid: tuple[float, ...] | None
    shared: bool = False
    with_total_steps: bool = True  # without, every beginning of its run is a shorter run


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
    horizon: tuple[tuple[str, str], ...] = ()  # (label, opponent): shorter runs of the one that match the other

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        tasks = {name: PlannedTask(**t) for name, t in data["tasks"].items()}
        optimizers = {
            label: PlannedOptimizer(**{**o, "grid": tuple(o["grid"]) if o["grid"] else None})
            for label, o in data["optimizers"].items()
        }
        pairs = tuple(tuple(pair) for pair in data["horizon"] or ())
        return cls(**{**data, "tasks": tasks, "optimizers": optimizers, "horizon": pairs})


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
        return (self.suite, self.task, self.fingerprint, name, self.theta, self.lr, self.seed, self.steps)


Runs = dict[Hashable, Curve]


class Store(jobs.Store[Job, Curve]):
    """``runs.jsonl`` of an evaluation: one line a plan, a finished run, or what a TimingStore reads."""

    holds = "of an evaluation"

    def __init__(self, path: Path) -> None:
        self.plan: Plan | None = None
        super().__init__(path)

    def take(self, record: dict[str, Any]) -> None:
        """A plan or a run."""
        if "plan" in record:
            self.plan = Plan.from_dict(record["plan"])
        elif "timing" not in record:  # those are the TimingStore's
            self.runs[Job(**record["job"]).key] = _curve_from(record["curve"])

    def add_plan(self, plan: Plan) -> None:
        """From now on this is the plan."""
        self.plan = plan
        jsonl.append(self.path, {"plan": asdict(plan)})

    def record(self, job: Job, result: Curve) -> dict[str, Any]:
        """Losses with six digits, infinite ones as null."""
        losses = {"train": _finite(result.train), "held_out": _finite(result.held_out)}
        return {"job": asdict(job), "curve": {**asdict(result), **losses}}

    def describe(self, job: Job, result: Curve) -> str:
        """Task, optimizer, rate, seed, steps and final loss."""
        rate = "" if job.lr is None else f" lr {job.lr:g}"
        loss = "diverged" if result.diverged else f"train loss {result.final_train:.4g}"
        what = f"{job.task} {job.optimizer}{rate} seed {job.seed} {job.steps} steps"
        return f"{what}: {loss} ({result.seconds:.1f} s)"


def _finite(losses: list[float]) -> list[float | None]:
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in losses]


def _curve_from(data: dict[str, Any]) -> Curve:
    losses = {k: [math.inf if x is None else x for x in data[k]] for k in ("train", "held_out")}
    return Curve(**{**data, **losses})
