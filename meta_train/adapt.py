"""Learning on a user's own tasks by whole runs, and saying whether it paid on tasks that were not learned from.

A learned rule names single numbers of theta that say something by themselves (``UpdateRule.constants``: the size of
steps by role, how it changes as a run goes on, the share of fresh gradients, momentum, decay). In rounds, fresh tasks
are trained with these numbers at random about the best ones so far, beside the same runs of the hand-made rule. A
quadratic function fitted to the changes of the logarithm of the final loss says where they are best, as far as that is
sure (:mod:`meta_train.surface`). Gradients of theta are not needed, and runs have their full length.
"""

import json
import runpy
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from learned_opt.checkpoint import save_weights, write_atomically
from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from meta_train.bench.jobs import Execute, JobProgress, Store, do_missing, job_progress, pool
from meta_train.errors import UsageError
from meta_train.processes import under_torchrun
from meta_train.surface import Surface
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.task import Task, TaskFamily

RULE = "learned"
TASKS, COPIES, RUNS = 8, 12, 2  # of a round; runs of a task with other numbers; weights and batches that each has
JUDGED = 12  # fresh tasks
SPREAD, NARROWEST = 0.4, 0.5  # of the numbers in the first round, and relative to that in the last
REACH = 2.0  # times the spread: the largest change of a number between two rounds
FARTHEST = 1.5  # of a number from zero
RIDGE = 1.0
FEWEST, MOST = 3, 60  # rounds
SEARCH = 0.85  # of the time goes into the search
FLOOR = 1e-5  # losses below it, relative to a task's ceiling, count as it

Source = Mapping[str, TaskFamily] | Path
Theta = dict[str, Tensor]


class Verdict(NamedTuple):
    """Changes of the logs of final losses against the hand-made rule, over tasks that were not learned from.

    Attributes:
        change: mean over tasks, of the train loss; below zero is better.
        low: of its 95 % interval (Student's t over tasks).
        high: the same.
        held_out: mean change of the held-out loss.
    """

    change: float
    low: float
    high: float
    held_out: float

    @property
    def better(self) -> bool:
        """Whether the interval is below zero."""
        return self.high < 0

    def __str__(self) -> str:
        found = (
            f"final train loss {torch.tensor(self.change).expm1():+.1%}, log {self.change:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}]; held-out, log {self.held_out:+.3f}"
        )
        if self.better:
            return f"Better than the default on tasks that it has not seen: {found}."
        return f"NOT shown to be better than the default on tasks that it has not seen: {found}. Keep the default."


@dataclass(frozen=True)
class Runs:
    """Runs of one task with several values of the constants, beside runs of the hand-made rule.

    Attributes:
        stage: "search" or "judge".
        round: of the search.
        number: of the task.
        at: the constants that are best so far.
        spread: of those that are drawn about them; 0: there are none.
    """

    stage: str
    round: int
    number: int
    at: tuple[float, ...]
    spread: float

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells jobs apart."""
        return self.stage, self.round, self.number


class Result(NamedTuple):
    """Points ``[copies x runs][constants]``, the changes that they made to the logs of losses, and what it took."""

    points: list[list[float]]
    train: list[float]
    held_out: list[float]
    seconds: float


class Results(Store[Runs, Result]):
    """The file of finished runs."""

    holds = "a file of runs of adapt"

    def take(self, record: dict[str, Any]) -> None:
        stage, number, task = record["key"]
        self.runs[stage, number, task] = Result(*(record[k] for k in Result._fields))

    def record(self, job: Runs, result: Result) -> dict[str, Any]:
        return {"key": list(job.key), **result._asdict()}

    def describe(self, job: Runs, result: Result) -> str:
        return f"task {job.number + 1}: {result.seconds:.0f} s"


def adapt(
    source: Source,
    out: Path,
    minutes: float,
    seed: int = 0,
    workers: int = 1,
    say: Callable[[str], None] | None = None,
) -> Verdict:
    """Learn constants of the learned rule on these families, and judge them on fresh tasks of theirs.

    ``out`` receives ``theta.safetensors``, ``runs.jsonl``, ``verdict.json`` and ``tensorboard/``. The same call goes on
    after an interruption. The number of workers changes nothing but the time.

    Args:
        source: families by name, or the file that defines them, which several workers need.
        out: folder of the run.
        minutes: about how long it takes, three rounds at least.
        seed: of everything.
        workers: processes, of one thread each.
        say: is told what happens; None: a progress bar or lines.

    Raises:
        UsageError: no families, no time, other minutes or another seed than the run in ``out``, several workers without
            a file, or under ``torchrun``.
    """
    families = families_of(source)
    if not families or minutes <= 0 or workers < 1:
        raise UsageError("adapt needs task families (a dict named families in the file), a positive time and a worker.")
    if under_torchrun():
        raise UsageError("adapt starts its own processes. Start it without torchrun, with --workers.")
    if workers > 1 and not isinstance(source, Path):
        raise UsageError("Several workers read the families from a file. Pass its path, or one worker.")
    out.mkdir(parents=True, exist_ok=True)
    _same_plan(out / "plan.json", {"minutes": minutes, "seed": seed})
    rule = RULES[RULE]()
    store = Results(out / "runs.jsonl")
    work = partial(made, source, seed)
    with (
        pool(workers) as execute,
        job_progress(say) as progress,
        closing(SummaryWriter(str(out / "tensorboard"))) as board,
    ):
        at = _searched(rule, minutes * 60 * workers, store, work, execute, progress, board)
        theta = with_constants(rule, at)
        path = out / "theta.safetensors"
        told = {k: round(v, 4) for k, v in zip(rule.constants, at, strict=True)}
        save_weights(path, RULE, theta, {"adapted": sorted(families), "seed": seed, "constants": told})
        jobs = [Runs("judge", 0, k, at, 0.0) for k in range(JUDGED)]
        do_missing("judging on fresh tasks", jobs, work, store, execute, progress)
    verdict = _verdict([store.runs[j.key] for j in jobs])
    write_atomically(out / "verdict.json", json.dumps(verdict._asdict() | {"better": verdict.better}, indent=1).encode())
    progress.say("Constants, before they are bounded: " + ", ".join(f"{k} {v:+.2f}" for k, v in told.items()))
    progress.say(str(verdict))
    if verdict.better:
        progress.say(f"Use it: NFNOpt(model.parameters(), rule={str(path)!r}, total_steps=...)")
    return verdict


def _searched(
    rule: UpdateRule,
    seconds: float,
    store: Results,
    work: Callable[[Runs], Result],
    execute: Execute,
    progress: JobProgress,
    board: SummaryWriter,
) -> tuple[float, ...]:
    """The best constants, after as many rounds as there is time for. What the first took says how many that are."""
    at, rounds, k = (0.0,) * len(rule.constants), FEWEST, 0
    done: list[tuple[Runs, Result]] = []
    while k < rounds:
        jobs = [Runs("search", k, i, at, SPREAD * max(NARROWEST, 0.9**k)) for i in range(TASKS)]
        do_missing(f"round {k + 1}" + (f" of {rounds}" if k else ""), jobs, work, store, execute, progress)
        if k == 0:
            took = sum(store.runs[j.key].seconds for j in jobs)
            rounds = max(FEWEST, min(MOST, int(seconds * SEARCH / max(took, 1e-9))))
        now = [sum(store.runs[j.key].train[RUNS : 2 * RUNS]) / RUNS for j in jobs]  # of copy 1, the best ones before
        mean, error = sum(now) / len(now), float(stats.sem(now))
        k += 1
        done += [(j, store.runs[j.key]) for j in jobs]
        at, expected = _best(done)
        board.add_scalar("change of the log of the final train loss", mean, k)
        progress.say(
            f"round {k} of {rounds}: what the rounds before had found changed the log of the final train loss by "
            f"{mean:+.3f} +- {error:.3f}; now {expected:+.3f} at most is expected"
        )
    return at


def _best(found: list[tuple[Runs, Result]]) -> tuple[tuple[float, ...], float]:
    """The best constants no farther from those of the last round than its runs were, and the change to expect."""
    points = torch.tensor([p for _, r in found for p in r.points]) / SPREAD
    changes = torch.tensor([x for _, r in found for x in r.train])
    task = torch.tensor([TASKS * j.round + j.number for j, r in found for _ in r.points])
    last = found[-1][0]
    center, reach, limit = torch.tensor(last.at).double() / SPREAD, REACH * last.spread / SPREAD, FARTHEST / SPREAD

    def bounded(x: Tensor) -> Tensor:
        return center + (x.clamp(-limit, limit) - center).clamp(-reach, reach)

    point, value = Surface(points, changes, task, RIDGE).lowest(bounded, points.shape[1])
    return tuple((SPREAD * point).tolist()), value


# ------------------------------------------------------------------------------------------- runs of a task
def made(source: Source, seed: int, job: Runs) -> Result:
    """The runs of a job."""
    start = time.process_time()
    families = families_of(source)
    generator = generator_of(seed, f"adapt {job.stage}", (job.round, job.number))
    names = sorted(families)
    task = families[names[(job.round * TASKS + job.number) % len(names)]](generator)
    points = _points(job, generator)
    train, held_out = changes(RULES[RULE](), task, points, generator)
    flat = points.transpose(0, 1).flatten(0, 1).tolist()
    return Result(flat, train.flatten().tolist(), held_out.flatten().tolist(), time.process_time() - start)


def _points(job: Runs, generator: torch.Generator) -> Tensor:
    """``[RUNS, copies, constants]``: zero, the best so far, and others about these."""
    at = torch.tensor(job.at)
    copies = COPIES if job.spread else 2
    noise = job.spread * torch.randn(RUNS, copies, len(at), generator=generator)
    noise *= torch.rand(noise.shape, generator=generator) < 0.5
    points = (at + noise).clamp(-FARTHEST, FARTHEST)
    points[:, 0], points[:, 1] = 0, at
    return points


@torch.no_grad()
def changes(rule: UpdateRule, task: Task, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What constants make of the logs of final losses, against the first copy's: train and held-out, each [copies, runs].

    Args:
        rule: whose constants.
        task: it is trained for its own number of steps.
        points: constants ``[runs, copies, constants]``. The copies of a run have the same weights and batches.
        generator: of these.
    """
    runs, copies = points.shape[:2]
    rule.requires_grad_(False)
    unroll = Unroll(task, rule, symmetry_of(task), (task.steps, task.steps), transform="log", floor=FLOOR)
    theta = with_constants(rule, points.transpose(0, 1).flatten(0, 1))
    particles = unroll.init(runs * copies, generator, copies=copies, common=True)
    after, trace = unroll(theta, particles, task.steps, generator, copies=copies, batched=True, resets=False)
    batch = tuple(b.expand(runs * copies, *b.shape) for b in task.held_out())
    ends = torch.stack([trace.loss[-max(1, task.steps // 10) :].mean(0), unroll.losses(after["params"], batch)])
    ends = ends.view(2, copies, runs)
    train, held_out = (ends - ends[:, :1]).unbind()
    return train, held_out


def with_constants(rule: UpdateRule, at: Tensor | tuple[float, ...]) -> Theta:
    """The rule's theta with its constants at these values ``[constants]``, or one for each row: ``[P, constants]``."""
    values = torch.as_tensor(at, dtype=torch.float32)
    theta = {n: p.detach().expand(*values.shape[:-1], *p.shape).clone() for n, p in rule.named_parameters()}
    for (name, index), value in zip(rule.constants.values(), values.unbind(-1), strict=True):
        theta[name][(..., *index)] = value
    return theta


def families_of(source: Source) -> Mapping[str, TaskFamily]:
    """The families, from their file if it is one."""
    return _read(source) if isinstance(source, Path) else source


@lru_cache(maxsize=1)
def _read(path: Path) -> Mapping[str, TaskFamily]:
    return runpy.run_path(str(path)).get("families", {})


def _same_plan(path: Path, plan: dict[str, float]) -> None:
    if not path.exists():
        write_atomically(path, json.dumps(plan).encode())
    begun = json.loads(path.read_text())
    if begun != plan:
        raise UsageError(
            f"{path.parent} was begun with minutes={begun['minutes']:g} and seed={begun['seed']}. Use these, or "
            "another folder."
        )


def _verdict(results: list[Result]) -> Verdict:
    trains, helds = ([sum(x[RUNS:]) / RUNS for x in xs] for xs in zip(*((r.train, r.held_out) for r in results)))
    mean = sum(trains) / len(trains)
    low, high = stats.t.interval(0.95, len(trains) - 1, mean, stats.sem(trains)) if any(trains) else (mean, mean)
    return Verdict(mean, float(low), float(high), sum(helds) / len(helds))
