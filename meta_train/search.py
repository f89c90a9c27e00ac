"""A search for single numbers of theta by whole runs: no gradients of theta, runs of their full length.

A learned rule names numbers of theta that say something by themselves (``UpdateRule.constants``: sizes of steps by
role, the share of fresh gradients, momentum, decay; ``UpdateRule.slopes``: how these depend on what the rule measures).
In rounds, fresh tasks are trained with these numbers at random about the best ones so far, beside the same runs of the
hand-made rule. A quadratic function fitted to the changes of the logarithm of the final loss says where they are best,
as far as that is sure (:mod:`meta_train.surface`).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from meta_train.bench.jobs import Execute, JobProgress, Store, do_missing, short_hash
from meta_train.errors import UsageError
from meta_train.paired import paired_ends
from meta_train.surface import Surface
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.task import Task, TaskFamily

RULE = "learned"
JUDGED_RUNS = 2  # pairs of runs of a task
LARGEST = 1.0  # changes beyond count as this
MOVED = 0.5  # share of the numbers that differ from the best so far
FLOOR = 1e-5  # losses below it, relative to a task's ceiling, count as it

Families = Callable[[], Mapping[str, TaskFamily]]
Theta = dict[str, Tensor]
Places = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Search:
    """How numbers are searched.

    Attributes:
        tasks: of a round.
        copies: runs of a task from the same weights, with the same batches: the first is the hand-made rule's, the
            second has the best numbers so far, the others have random ones about these.
        runs: weights and batches of a task.
        spread: standard deviation of a number in the first round.
        narrowest: that in late rounds, relative to ``spread``.
        reach: the largest distance between the best numbers of two rounds, relative to that of random ones.
        farthest: a number from zero.
        slopes: whether ``UpdateRule.slopes`` are searched too.
        horizon: lowest and highest number of steps, drawn log-uniformly; None: the task's own.
        seed: of everything.
    """

    tasks: int = 8
    copies: int = 12
    runs: int = 2
    spread: float = 0.4
    narrowest: float = 0.5
    reach: float = 1.0
    farthest: float = 1.5
    slopes: bool = False
    horizon: tuple[int, int] | None = None
    seed: int = 0

    def places(self, rule: UpdateRule) -> Places:
        """The numbers: by name, the parameter and the place in it."""
        return {**rule.constants, **(rule.slopes if self.slopes else {})}

    def spread_in(self, round_: int) -> float:
        """The standard deviation of a number in a round."""
        return self.spread * max(self.narrowest, 0.9**round_)


@dataclass(frozen=True)
class Runs:
    """Runs of one task with several values of the numbers, beside runs of the hand-made rule.

    Attributes:
        stage: "search" or "judge".
        round: of the search.
        number: of the task.
        at: the best numbers so far.
        spread: of those that are drawn about them; 0: none are.
    """

    stage: str
    round: int
    number: int
    at: tuple[float, ...]
    spread: float

    @property
    def key(self) -> tuple[str, int, int, str]:
        """What tells jobs apart."""
        return self.stage, self.round, self.number, short_hash(self.at, self.spread)


class Result(NamedTuple):
    """Of the runs of a task.

    Attributes:
        name: of the task.
        steps: of every run.
        points: the numbers, ``[copies * runs][numbers]``, the first copy of all runs first.
        train: change of the log of the final train loss that each made, against the first copy of its run.
        held_out: the same of the held-out loss.
        seconds: of the processor, for all of them.
    """

    name: str
    steps: int
    points: list[list[float]]
    train: list[float]
    held_out: list[float]
    seconds: float


class Results(Store[Runs, Result]):
    """The file of finished runs."""

    holds = "a file of runs of a search"

    def take(self, record: dict[str, Any]) -> None:
        self.runs[tuple(record["key"])] = Result(*(record[k] for k in Result._fields))

    def record(self, job: Runs, result: Result) -> dict[str, Any]:
        return {"key": list(job.key), **result._asdict()}

    def describe(self, job: Runs, result: Result) -> str:
        return f"{result.name}, {result.steps} steps: {result.seconds:.0f} s"


def searched(
    search: Search,
    rounds_for: Callable[[float], int],
    store: Results,
    families: Families,
    execute: Execute,
    progress: JobProgress,
    board: SummaryWriter,
) -> tuple[float, ...]:
    """The best numbers.

    Args:
        search: how.
        rounds_for: how many rounds there are, of the processor seconds that the first took.
        store: of finished runs; what is there is not made again.
        families: where tasks come from.
        execute: where runs are made.
        progress: is told.
        board: the same.
    """
    work = partial(made, search, families)
    at, rounds, k = (0.0,) * len(search.places(RULES[RULE]())), 1, 0
    done: list[tuple[Runs, Result]] = []
    while k < rounds:
        jobs = [Runs("search", k, i, at, search.spread_in(k)) for i in range(search.tasks)]
        do_missing(f"round {k + 1}" + (f" of {rounds}" if k else ""), jobs, work, store, execute, progress)
        here = [store.runs[j.key] for j in jobs]
        if k == 0:
            rounds = max(1, rounds_for(sum(r.seconds for r in here)))
        k += 1
        done += zip(jobs, here, strict=True)
        mean, error = _at_the_best(search, here)
        at, expected = best_of(search, done)
        board.add_scalar("change of the log of the final train loss", mean, k)
        progress.say(
            f"round {k} of {rounds}: log of the final train loss against the hand-made rule {mean:+.3f} +- {error:.3f} "
            f"with the numbers found before; {expected:+.3f} expected with those found now"
        )
    return at


def _at_the_best(search: Search, here: list[Result]) -> tuple[float, float]:
    each = [sum(r.train[search.runs : 2 * search.runs]) / search.runs for r in here]  # of the second copy
    return sum(each) / len(each), float(stats.sem(each)) if len(each) > 1 else math.nan


def best_of(search: Search, done: list[tuple[Runs, Result]]) -> tuple[tuple[float, ...], float]:
    """The best numbers no farther from those of the last round than its runs were, or zero; the change to expect."""
    unit = search.spread
    points = torch.tensor([p for _, r in done for p in r.points]) / unit
    changes = torch.tensor([x for _, r in done for x in r.train])
    task = torch.tensor([search.tasks * j.round + j.number for j, r in done for _ in r.points])
    run = search.runs * task + torch.tensor([i % search.runs for _, r in done for i in range(len(r.points))])
    last = done[-1][0]
    center = torch.tensor(last.at).double() / unit
    limit = search.farthest / unit
    reach = search.reach * last.spread / unit * (len(center) * MOVED) ** 0.5

    def bounded(x: Tensor) -> Tensor:
        step = x.clamp(-limit, limit) - center
        return center + step * (reach / torch.linalg.vector_norm(step, dim=-1, keepdim=True)).clamp(max=1.0)

    point, value = Surface(points, changes, task, largest=LARGEST, run=run).lowest(bounded, points.shape[1])
    return tuple(_rounded(unit * point)), value


# ------------------------------------------------------------------------------------------- runs of a task
def made(search: Search, families: Families, job: Runs) -> Result:
    """The runs of a job."""
    start = time.process_time()
    generator = generator_of(search.seed, f"search {job.stage}", (job.round, job.number))
    known = families()
    names = sorted(known)
    family = names[(job.round * search.tasks + job.number) % len(names)]
    task = known[family](generator)
    if not hasattr(task, "batches"):
        raise UsageError(f"The family {family!r} draws no task but {task!r}. See docs/meta_training.md.")
    steps = task.steps
    if search.horizon is not None:
        low, high = search.horizon
        steps = int(low * (high / low) ** float(torch.rand((), generator=generator)))
    rule = RULES[RULE]()
    points = drawn(search, job, generator)
    train, held_out = changes(rule, search.places(rule), task, steps, points, generator)
    flat = [_rounded(p) for p in points.transpose(0, 1).flatten(0, 1)]
    seconds = time.process_time() - start
    return Result(task.name, steps, flat, _rounded(train.flatten()), _rounded(held_out.flatten()), round(seconds, 2))


def _rounded(x: Tensor) -> list[float]:
    """As it is stored, so that a run that goes on sees what it saw before."""
    return [round(v, 5) for v in x.nan_to_num(nan=LARGEST, posinf=LARGEST, neginf=-LARGEST).tolist()]


def drawn(search: Search, job: Runs, generator: torch.Generator) -> Tensor:
    """``[runs, copies, numbers]``: zero, the best so far, and others about these."""
    at = torch.tensor(job.at)
    runs, copies = (search.runs, search.copies) if job.spread else (JUDGED_RUNS, 2)
    noise = job.spread * torch.randn(runs, copies, len(at), generator=generator)
    noise *= torch.rand(noise.shape, generator=generator) < MOVED
    points = ((at + noise).clamp(-search.farthest, search.farthest) * 1e5).round() / 1e5  # as they are stored
    points[:, 0], points[:, 1] = 0, at
    return points


def changes(
    rule: UpdateRule, places: Places, task: Task, steps: int, points: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What numbers make of the logs of final losses, against the first copy's.

    Args:
        rule: whose numbers.
        places: of the numbers.
        task: to train.
        steps: of every run.
        points: the numbers ``[runs, copies, numbers]``. The copies of a run have the same weights and batches.
        generator: of these.

    Returns:
        Train (mean over the last tenth of the steps) and held-out, ``[copies, runs]`` each.
    """
    rule.requires_grad_(False)
    unroll = Unroll(task, rule, symmetry_of(task), (steps, steps), transform="log", floor=FLOOR)
    theta = with_numbers(rule, places, points.transpose(0, 1).flatten(0, 1))
    train, held_out = paired_ends(unroll, theta, points.shape[1], steps, generator)
    return train - train[:1], held_out - held_out[:1]


def with_numbers(rule: UpdateRule, places: Places, at: Tensor | tuple[float, ...]) -> Theta:
    """The rule's theta with numbers at these values ``[numbers]``, or one for each row: ``[P, numbers]``."""
    values = torch.as_tensor(at, dtype=torch.float32)
    theta = {n: p.detach().expand(*values.shape[:-1], *p.shape).clone() for n, p in rule.named_parameters()}
    for (name, index), value in zip(places.values(), values.unbind(-1), strict=True):
        place: tuple[Any, ...] = (..., *index)
        theta[name][place] = value
    return theta
