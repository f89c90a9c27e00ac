"""CPU seconds of training steps, of several optimizers in turns, so that a busy machine is as slow for each of them."""

import copy
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from meta_train.bench import jobs
from meta_train.bench.optimizers import MakeOptimizer, load_weights

PERIOD = 50  # steps after which rules that do part of their work now and then have done all of it as often
STEPS = 10 * PERIOD  # of each contender that are measured: some parts become rarer as a run goes on
WARM_UP = 20  # first steps, which set up state and caches: reported apart
TURN = 5  # steps of one contender before the next one's

K = TypeVar("K", bound=Hashable)
Lap = dict[str, float]  # CPU seconds of one step, by part


@dataclass(frozen=True)
class StepSeconds:
    """CPU seconds of a training step: means over whole multiples of ``PERIOD`` steps.

    Attributes:
        data: drawing the batch.
        gradient: forward and backward pass.
        step: the optimizer and its schedule.
        spread: of the whole step: the standard deviation over periods.
        first: making the optimizer and its first ``WARM_UP`` steps (without data and gradients), in all.
        steps: how many were measured.
    """

    data: float
    gradient: float
    step: float
    spread: float
    first: float
    steps: int

    @property
    def whole(self) -> float:
        """Data, gradient and optimizer."""
        return self.data + self.gradient + self.step

    @classmethod
    def of(cls, first: float, laps: Sequence[Lap]) -> "StepSeconds":
        """From the measured steps, a whole multiple of ``PERIOD``, and the seconds of the first ones."""
        if not laps or len(laps) % PERIOD:
            raise ValueError(f"{len(laps)} steps were measured: they must be a multiple of {PERIOD}.")
        parts = {part: statistics.fmean(lap[part] for lap in laps) for part in ("data", "gradient", "step")}
        whole = [sum(lap.values()) for lap in laps]
        periods = [statistics.fmean(whole[k : k + PERIOD]) for k in range(0, len(whole), PERIOD)]
        return cls(**parts, spread=statistics.pstdev(periods), first=first, steps=len(laps))


def in_turns(
    contenders: Mapping[K, Callable[[], Lap | None]], warm_up: int = WARM_UP, steps: int = STEPS, turn: int = TURN
) -> dict[K, tuple[list[Lap], list[Lap]]]:
    """Steps of each contender, ``turn`` at a time; who begins a round changes with every round.

    Args:
        contenders: by name what makes one step and returns its seconds, or None if it cannot go on.
        warm_up: first steps, in a round of their own.
        steps: those after them.
        turn: steps before the next contender's turn.

    Returns:
        By name the laps of the warm-up and those of the steps; without the contenders that could not go on.
    """
    laps: dict[K, list[Lap]] = {name: [] for name in contenders}
    turns = [warm_up, *[turn] * (steps // turn), steps % turn]
    order = list(contenders)
    for count in turns:
        for name in [n for n in order if n in laps]:
            for _ in range(count):
                lap = contenders[name]()
                if lap is None:
                    del laps[name]
                    break
                laps[name].append(lap)
        order = [*order[1:], *order[:1]]
    return {name: (found[:warm_up], found[warm_up:]) for name, found in laps.items()}


# --------------------------------------------------------------------------------- steps on a task


class TaskSteps:
    """Training steps of one optimizer on a task, on a copy of its model, as :func:`meta_train.bench.curves.run` makes
    them; each call makes one, and is None once the loss is not finite."""

    def __init__(self, task: Any, make_optimizer: MakeOptimizer, seed: int, clock: Callable[[], float]) -> None:
        self.task, self.clock = task, clock
        self.generator = torch.Generator().manual_seed(seed)
        self.model = copy.deepcopy(task.model).train()
        load_weights(self.model, task.init(self.generator))
        self.params = dict(self.model.named_parameters())
        start = clock()
        self.optimizer, self.scheduler = make_optimizer(self.model, steps=max(task.steps, WARM_UP + STEPS))
        getattr(self.optimizer, "train", lambda: None)()  # as Schedule-Free wants it
        self.making = clock() - start

    def __call__(self) -> Lap | None:
        at = [self.clock()]
        batch = self.task.batch(self.generator)
        at.append(self.clock())
        self.optimizer.zero_grad()
        loss = self.task.loss(self.params, batch)
        if not bool(loss.isfinite()):
            return None
        loss.backward()
        at.append(self.clock())
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        at.append(self.clock())
        return {part: at[k + 1] - at[k] for k, part in enumerate(("data", "gradient", "step"))}


def time_steps(
    task: Any,
    make: Mapping[K, MakeOptimizer],
    seed: int = 0,
    steps: int = STEPS,
    clock: Callable[[], float] = time.process_time,
) -> dict[K, StepSeconds]:
    """Seconds of a training step of each optimizer on a task; without those whose loss became infinite.

    Args:
        task: see ``tasks.task.Task``.
        make: optimizers by name, each ``(model, steps=steps) -> (optimizer, scheduler or None)``.
        seed: of the weights and the data, the same for all.
        steps: how many to measure, a multiple of ``PERIOD``.
        clock: of CPU time, which other processes do not stretch.
    """
    running = {name: TaskSteps(task, factory, seed, clock) for name, factory in make.items()}
    found = {}
    for name, (first, laps) in in_turns(running, WARM_UP, steps).items():
        start = running[name].making + sum(lap["step"] for lap in first)
        found[name] = StepSeconds.of(start, laps)
    return found


# ------------------------------------------------------------------------------- the evaluation's part


@dataclass(frozen=True)
class Contender:
    """An optimizer at a learning rate."""

    optimizer: str
    theta: str
    lr: float | None

    @property
    def identity(self) -> tuple:
        """What it does: of a learned one not the path that it was loaded from."""
        return ("learned" if self.theta else self.optimizer, self.theta, self.lr)


@dataclass(frozen=True)
class TimingJob:
    """All optimizers of a plan on one task."""

    suite: str
    task: str
    fingerprint: str
    contenders: tuple[Contender, ...]

    @property
    def key(self) -> tuple:
        """What tells jobs apart."""
        return (self.suite, self.task, self.fingerprint, tuple(c.identity for c in self.contenders))


Timings = dict[tuple, StepSeconds]  # identity of a contender -> its seconds


class TimingStore(jobs.Store[TimingJob, Timings]):
    """The lines of ``runs.jsonl`` that hold seconds; plans and runs are passed over."""

    holds = "of an evaluation"

    def take(self, record: dict[str, Any]) -> None:
        """Seconds of all contenders of a job."""
        if "timing" in record:
            stored = record["timing"]
            job = TimingJob(**{**stored, "contenders": tuple(Contender(**c) for c in stored["contenders"])})
            seconds = [None if s is None else StepSeconds(**s) for s in record["seconds"]]
            pairs = zip(job.contenders, seconds, strict=True)
            self.runs[job.key] = {c.identity: s for c, s in pairs if s is not None}

    def record(self, job: TimingJob, result: Timings) -> dict[str, Any]:
        """Seconds in the order of the contenders, null where there are none."""
        found = [result.get(c.identity) for c in job.contenders]
        return {"timing": asdict(job), "seconds": [None if s is None else _rounded(s) for s in found]}

    def describe(self, job: TimingJob, result: Timings) -> str:
        """Task, and milliseconds of the steps."""
        steps = (f"{c.optimizer} {1e3 * result[c.identity].whole:.3g}" for c in job.contenders if c.identity in result)
        return f"{job.task}, ms: {', '.join(steps)}"

    def of(self, job: TimingJob) -> Timings | None:
        """The last seconds of all contenders of a job, measured together with others or not; None if there are none."""
        wanted = {c.identity for c in job.contenders}
        for key, found in reversed(self.runs.items()):
            assert isinstance(key, tuple)  # of a job
            if key[:3] == job.key[:3] and wanted <= set(key[3]):
                return found
        return None


def _rounded(seconds: StepSeconds) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in asdict(seconds).items()}
