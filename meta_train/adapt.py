"""Learning on a user's own tasks, and saying whether it paid on tasks that were not learned from."""

import json
import math
import runpy
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from learned_opt.checkpoint import save_weights, write_atomically
from learned_opt.rules import RULES
from meta_train.bench.jobs import do_missing, job_progress, one_thread, pool, short_hash
from meta_train.errors import UsageError
from meta_train.processes import under_torchrun
from meta_train.search import JUDGED_RUNS, RULE, Result, Results, Runs, Search, made, searched, with_numbers
from tasks.task import TaskFamily

JUDGED = 12  # fresh tasks, or one of each family
FEWEST, MOST = 3, 60  # rounds
SHARE = 0.85  # of the time goes into the search

Source = Mapping[str, TaskFamily] | Path


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
    source: Source,
    out: Path,
    minutes: float,
    search: Search | None = None,
    workers: int = 1,
    say: Callable[[str], None] | None = None,
) -> Verdict:
    """Search numbers of the learned rule on these families (:mod:`meta_train.search`), and judge on fresh tasks.

    ``out`` receives ``theta.safetensors``, ``runs.jsonl``, ``verdict.json`` and ``tensorboard/``. The same call goes on
    after an interruption. More workers make more rounds in the same time.

    Args:
        source: families by name, or the file that defines them, which several workers need.
        out: folder of the run.
        minutes: about how long it takes, three rounds at least.
        search: how; None: the defaults.
        workers: processes, of one thread each.
        say: is told what happens; None: a progress bar or lines.

    Raises:
        UsageError: no families, no time, another plan than that of the run in ``out``, several workers without a file,
            or under ``torchrun``.
    """
    search = Search() if search is None else search
    families = Loaded(source)
    known = families()
    if not isinstance(known, Mapping) or not known or not all(callable(v) for v in known.values()):
        raise UsageError(
            "adapt needs families: a dict of functions by name, in a file under that name (docs/meta_training.md)."
        )
    if not 0 < minutes < math.inf or workers < 1:
        raise UsageError("adapt needs a positive time and at least one worker.")
    if under_torchrun():
        raise UsageError("adapt starts its own processes. Start it without torchrun, with --workers.")
    if workers > 1 and not isinstance(source, Path):
        raise UsageError("Several workers read the families from a file. Pass its path, or one worker.")
    out.mkdir(parents=True, exist_ok=True)
    told = short_hash(source.read_text()) if isinstance(source, Path) else ""
    plan = {"minutes": minutes, "workers": workers, "search": repr(search), "families": [*sorted(known), told]}
    seconds = _planned(out / "plan.json", plan) * 60 * SHARE
    rule = RULES[RULE]()
    places = search.places(rule)
    store = Results(out / "runs.jsonl")
    with (
        one_thread(),
        pool(workers) as execute,
        job_progress(say) as progress,
        closing(SummaryWriter(str(out / "tensorboard"), purge_step=0)) as board,
    ):
        at = searched(
            search,
            lambda took: max(FEWEST, min(MOST, int(seconds / max(took, 1e-9)))),
            store,
            families,
            execute,
            progress,
            board,
        )
        path = out / "theta.safetensors"
        numbers = dict(zip(places, at, strict=True))
        provenance = {"families": sorted(known), "search": repr(search), "numbers": numbers}
        save_weights(path, RULE, with_numbers(rule, places, at), provenance)
        if not any(at):
            progress.say("No numbers were found that are better for sure. Keep the default.")
        jobs = [Runs("judge", 0, k, at, 0.0) for k in range(max(JUDGED, len(known)) if any(at) else 0)]
        judged = replace(search, horizon=None)
        do_missing("judging on fresh tasks", jobs, partial(made, judged, families), store, execute, progress)
        verdict = verdict_of([store.runs[j.key] for j in jobs]) if jobs else Verdict(0.0, 0.0, 0.0, 0.0)
        write_atomically(out / "verdict.json", json.dumps(verdict._asdict() | {"better": verdict.better}).encode())
        found = ", ".join(f"{k} {v:+.2f}" for k, v in numbers.items() if v)
        progress.say(f"Found (arguments of tanh): {found or 'nothing'}")
        progress.say(str(verdict))
        if verdict.better:
            progress.say(f"Use it: NFNOpt(model.parameters(), rule={str(path)!r}, total_steps=...)")
    return verdict


def verdict_of(results: list[Result]) -> Verdict:
    """Of pairs of runs: the hand-made rule's first, then those with what was learned."""
    trains, helds = (
        [sum(x[JUDGED_RUNS:]) / JUDGED_RUNS for x in xs]
        for xs in zip(*((r.train, r.held_out) for r in results), strict=True)
    )
    mean = sum(trains) / len(trains)
    error = float(stats.sem(trains))
    low, high = stats.t.interval(0.95, len(trains) - 1, mean, error) if error > 0 else (mean, mean)
    return Verdict(mean, float(low), float(high), sum(helds) / len(helds))


@dataclass(frozen=True)
class Loaded:
    """Families, read from their file in every process that asks for them."""

    source: Source

    def __call__(self) -> Mapping[str, TaskFamily]:
        return _read(self.source) if isinstance(self.source, Path) else self.source


@lru_cache(maxsize=1)
def _read(path: Path) -> Mapping[str, TaskFamily]:
    return runpy.run_path(str(path)).get("families", {})


def _planned(path: Path, plan: dict[str, object]) -> float:
    """Processor minutes that the run in this folder was begun with.

    Raises:
        UsageError: it was begun with another plan, or that cannot be read. The number of workers may change.
    """
    if not path.exists():
        write_atomically(path, json.dumps(plan).encode())
    try:
        begun = json.loads(path.read_text())
        workers = begun["workers"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is no plan of this version. Use another folder.") from None
    other = [f"{k}: {begun.get(k)}, not {plan[k]}" for k in plan if k != "workers" and begun.get(k) != plan[k]]
    if other:
        raise UsageError(f"{path.parent} was begun otherwise ({'; '.join(other)}). Use another folder.")
    return begun["minutes"] * workers
