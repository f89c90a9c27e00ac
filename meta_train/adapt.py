"""Learning on a user's own tasks, and saying whether it paid on tasks that were not learned from."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats

from learned_opt.checkpoint import load_weights, write_atomically
from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from meta_train.errors import UsageError
from meta_train.lengths import Theta, paired_ends, scaled
from meta_train.loop import Worker, estimate, train
from meta_train.processes import under_torchrun
from meta_train.recipes import Recipe, adapted, fresh_rule, trained
from meta_train.validation import make_unroll
from tasks.seeds import generator_of
from tasks.task import TaskFamily

JUDGED = 12  # fresh tasks
RUNS = 2  # pairs of runs of each
FITS = 4  # of lengths, in a run
FORWARD = 2.0  # how many times as fast whole runs are as those with a gradient, about
LEAST, MOST = 8, 400  # outer steps


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


def adapt(
    families: Mapping[str, TaskFamily],
    out: Path,
    minutes: float,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Verdict:
    """Meta-train on these families, from the hand-made rule, and judge on fresh tasks of theirs.

    ``out`` receives what :func:`meta_train.loop.train` writes, and ``verdict.json``. The same call goes on after an
    interruption.

    Args:
        families: the user's.
        out: folder of the run.
        minutes: about how long it takes; fits of lengths and the judgement alone take some (small networks: five).
        seed: of everything.
        say: is told what happens.

    Raises:
        UsageError: no families, no time, other minutes or another seed than the run in ``out``, or under ``torchrun``.
    """
    if not families or minutes <= 0:
        raise UsageError("adapt needs task families (a dict named families in the file) and a positive time.")
    if under_torchrun():
        raise UsageError("adapt runs in one process. Start it without torchrun, or use the command train.")
    out.mkdir(parents=True, exist_ok=True)
    plan = out / "plan.json"
    if not plan.exists():
        say("Measuring what an outer step takes.")
        begun = {"minutes": minutes, "seed": seed, "outer_steps": _affordable(families, 60 * minutes, seed)}
        write_atomically(plan, json.dumps(begun).encode())
    begun = json.loads(plan.read_text())
    if (begun["minutes"], begun["seed"]) != (minutes, seed):
        raise UsageError(
            f"{out} was begun with minutes={begun['minutes']:g} and seed={begun['seed']}. Use these, or another folder."
        )
    recipe = replace(adapted(families, begun["outer_steps"]), seed=seed)
    path = train(recipe, out, families=families)
    say(f"Judging on {JUDGED} tasks that were not learned from.")
    rule = fresh_rule(recipe, RULES)
    verdict = judge(recipe, rule, load_weights(path)[1], families)
    found = json.dumps(verdict._asdict() | {"better": verdict.better}, indent=1)
    write_atomically(out / "verdict.json", found.encode())
    say(str(verdict))
    if verdict.better:
        say(f"Use it: NFNOpt(model.parameters(), rule={str(path)!r}, total_steps=...)")
    return verdict


def judge(
    recipe: Recipe, rule: UpdateRule, theta: Theta, families: Mapping[str, TaskFamily], tasks: int = JUDGED
) -> Verdict:
    """Of theta against the hand-made rule, at the tasks' own numbers of steps."""
    trains, helds = [], []
    names = list(recipe.families)
    for k in range(tasks):
        generator = generator_of(recipe.seed, "judge", (k,))
        task = families[names[k % len(names)]](generator)
        unroll = replace(make_unroll(recipe, rule, task), horizon=(task.steps, task.steps), transform="log", floor=1e-5)
        ones = torch.ones(RUNS, len(rule.parts))
        own, none = scaled(rule, theta, ones), scaled(rule, theta, 0 * ones)
        ends = paired_ends(unroll, own, none, task.steps, generator)
        trains.append(float((ends.train[0] - ends.train[1]).mean()))
        helds.append(float((ends.held_out[0] - ends.held_out[1]).mean()))
    mean = sum(trains) / tasks
    low, high = stats.t.interval(0.95, tasks - 1, mean, stats.sem(trains)) if any(trains) else (mean, mean)
    return Verdict(mean, float(low), float(high), sum(helds) / tasks)


def _affordable(families: Mapping[str, TaskFamily], seconds: float, seed: int) -> int:
    """How many outer steps there is time for, beside the fits of lengths and the judgement."""
    recipe = replace(adapted(families, 1), seed=seed)
    rule = fresh_rule(recipe, RULES)
    theta, spent, steps, judged = trained(recipe, rule), 0.0, 0.0, 0.0
    for number, family in enumerate(families):
        worker = estimate(recipe, rule, theta, families, Worker(number, family), 0).worker
        start = time.monotonic()
        steps += estimate(recipe, rule, theta, families, worker, 1).metrics["particle_steps"]
        spent += time.monotonic() - start
        assert worker.unroll is not None
        judged += JUDGED / len(families) * 2 * RUNS * worker.unroll.task.steps
    lengths = recipe.lengths
    assert lengths is not None
    whole = judged + FITS * lengths.tasks * 2 * lengths.particles * lengths.steps
    left = seconds - whole * spent / steps / FORWARD
    return max(LEAST, min(MOST, int(left / (spent / len(families) * recipe.tasks_per_step))))
