"""The meta-training loop: estimate, step theta (the learned weights), validate, log, checkpoint.

It runs in one process or several.

Nothing random has a state: every draw comes from a generator seeded by (seed, purpose, outer step,
worker), so a worker's estimate is the same in whichever process it is made, and a run that was interrupted, even
killed, goes on as if it had not been.
"""

import math
import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import tasks.suites
from learned_opt.checkpoint import save_weights
from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from meta_train import checkpoint, jsonl
from meta_train.augmentation import augmented
from meta_train.bench.suites import task_fingerprint
from meta_train.estimators import Carry
from meta_train.lengths import Pairs, best_factors, compare, scaled
from meta_train.processes import Processes, processes
from meta_train.progress import GracefulShutdown, Reporter, draw_training
from meta_train.recipes import (
    Recipe,
    RecipeError,
    chosen,
    families_of_workers,
    fresh_rule,
    horizon_at,
    known,
    lr_at,
    trained,
)
from meta_train.unroll import Unroll
from meta_train.validation import make_unroll, score, with_mean
from tasks.seeds import generator_of
from tasks.task import Task, TaskFamily

Theta = dict[str, Tensor]

MAY_CHANGE = ("outer_steps", "minutes", "checkpoint_every", "validate_every", "validation")
"""Fields of a recipe that may differ when a run is resumed."""


def train(
    recipe: Recipe,
    out: Path,
    resume: Literal["auto", "never"] = "auto",
    *,
    rules: Mapping[str, Callable[[], UpdateRule]] | None = None,
    families: Mapping[str, TaskFamily] | None = None,
    validation: Mapping[str, Callable[[], Task]] | None = None,
) -> Path:
    """Meta-train by a recipe, in this process or in all that ``torchrun`` started; the result is the same.

    ``out`` receives ``theta.safetensors`` (the result), ``training.png``, ``log.jsonl``, ``tensorboard/`` and the last
    two checkpoints. Ctrl-C or SIGTERM: the step under way is given up, the run is saved and the process exits with 130
    or 143; a second one ends it at once.

    Args:
        recipe: what to do.
        out: folder of the run.
        resume: "auto" goes on from the last whole checkpoint in ``out``, if there is one; "never"
            deletes what an earlier run left there.
        rules: rules by name; ``learned_opt.rules.RULES`` if not given.
        families: task families by name; ``tasks.suites.TRAIN`` if not given.
        validation: validation tasks by name; ``tasks.suites.VALID`` if not given.

    Returns:
        The path of ``theta.safetensors``.

    Raises:
        RecipeError: the recipe names a rule, family or task that does not exist, or the checkpoint
            in ``out`` is of another recipe, or of families that have changed.
        TaskError: a task's ceiling, or a loss, is not positive.
        CheckpointError: no checkpoint in ``out`` is whole, or ``recipe.start`` cannot be used.
        FloatingPointError: theta became non-finite.
    """
    out = Path(out)
    rules = RULES if rules is None else rules
    families = tasks.suites.TRAIN if families is None else families
    validation = tasks.suites.VALID if validation is None else validation
    known("rule", [recipe.rule], rules)
    known("task family", recipe.families, families)
    known("validation task", recipe.validation, validation)
    rule = fresh_rule(recipe, rules)
    if not dict(rule.named_parameters()):
        raise RecipeError(f"rule {recipe.rule!r} has no theta to train. Choose a learned rule.")
    if recipe.lengths is not None and not rule.parts:
        raise RecipeError(f"rule {recipe.rule!r} does not name parts of theta whose lengths could be fitted.")
    known("part of theta", recipe.trained, dict(rule.named_children()) | dict(rule.named_parameters()))

    with (
        processes() as group,
        Reporter(out, recipe.outer_steps, group.rank == 0) as report,
        GracefulShutdown() as shutdown,
    ):
        if recipe.tasks_per_step < group.count:
            report.say(
                f"{group.count} processes share {recipe.tasks_per_step} tasks per step: some have nothing to do."
            )
        drawn = _fingerprints(recipe, families)
        run = _begin(recipe, rule, out, resume, drawn, group, report)
        wanted = (recipe.validation or validation) if recipe.validate_every else ()
        problems = {n: make() for n, make in validation.items() if n in wanted}
        started = time.monotonic() - run.counters["seconds"]
        saved = run.step

        def save() -> str:
            path = checkpoint.path_of(out, run.step)
            if group.rank == 0:
                run.log_bytes = report.flush()
                state = {"recipe": recipe.to_dict(), "families": drawn, "run": run.to_dict()}
                checkpoint.save(out, run.step, state)
            return str(path)

        while True:
            expired = recipe.minutes is not None and run.counters["seconds"] >= 60 * recipe.minutes
            over = run.step >= recipe.outer_steps or expired
            fitting = recipe.lengths is not None and run.fitted < run.step and run.step % recipe.lengths.every == 0
            due = bool(problems) and run.validated < run.step and (over or run.step % recipe.validate_every == 0)
            due = due and not fitting
            mine = _Work()
            # What may take long changes nothing, so a signal may end it anywhere.
            with shutdown.may_end_this():
                for name in group.deal(list(problems) if due else [], {n: t.steps for n, t in problems.items()}):
                    mine.scores |= score(recipe, rule, run.average, name, problems[name])
                for n in group.deal(list(range(recipe.lengths.tasks)) if recipe.lengths and fitting else [], {}):
                    mine.pairs[n] = pairs_of(recipe, rule, run.average, families, run.step, n)
                cost = {n: run.costs.get(run.workers[n].family, 1.0) for n in range(recipe.workers)}
                for n in group.deal([] if over or fitting else chosen(recipe, run.step), cost):
                    mine.parts.append(estimate(recipe, rule, run.theta, families, run.workers[n], run.step))
            mine.stopped_by, mine.seconds = shutdown.signal, time.monotonic() - started
            work = _joined(group, mine)

            run.counters["seconds"] = work.seconds
            if work.stopped_by is not None:
                report.say(
                    f"Stopped by {work.stopped_by.name} after outer step {run.step}; saved in "
                    f"{save()}. The same command continues from there."
                )
                raise SystemExit(128 + work.stopped_by)
            if fitting:
                report.fitted(run.step, fit_lengths(run, rule, [work.pairs[n] for n in sorted(work.pairs)]))
                continue
            if due:
                scores = with_mean(work.scores, problems)
                run.validated = run.step
                run.first = scores if run.step == 0 else run.first
                if not run.best or scores["loss"] < run.best["loss"]:
                    theta = {n: t.clone() for n, t in run.average.items()}
                    run.best = {"loss": scores["loss"], "step": run.step, "theta": theta}
                report.validated(run.step, scores, run.first, best=run.best["step"] == run.step)
            if over:
                break
            report.stepped(outer_step(recipe, run, work.parts), work.seconds)
            if run.step - saved >= recipe.checkpoint_every:
                save()
                saved = run.step

        save()
        path = out / "theta.safetensors"
        if group.rank == 0:
            best = run.best if recipe.validate_every else {}
            theta = {**dict(rule.named_parameters()), **(best["theta"] if best else run.average)}
            save_weights(path, recipe.rule, theta, _provenance(recipe, run, best, out, group.count))
            draw_training(out)
        report.say(f"{run.step} outer steps in {run.counters['seconds']:.0f} s: {path}")
    return path


# -------------------------------------------------------------------------------------- workers


@dataclass
class Worker:
    """A persistent task with its particles.

    ``task`` is a function of (recipe.seed, number, generation), so a checkpoint need not hold it.
    """

    number: int
    family: str
    generation: int = -1  # how often its task was replaced; -1: it has none yet
    uses: int = 0  # of the present task
    carry: Carry = field(default_factory=dict)
    unroll: Unroll | None = None  # None: to be made from the seed


@dataclass
class Estimated:
    """What one worker contributes to an outer step, and what it becomes."""

    worker: Worker
    loss: float
    gradient: Theta
    metrics: dict[str, float]
    seconds: float = 0.0

    def portable(self) -> "Estimated":
        """For another process: without the task, which the seed gives there too."""
        return replace(self, worker=replace(self.worker, unroll=None))


def draw_task(recipe: Recipe, family: TaskFamily, generator: torch.Generator) -> Task:
    """A task of a family, reparametrised as the recipe says."""
    return augmented(family(generator), recipe.augmentation, recipe.augmentation_scale, generator)


def estimate(
    recipe: Recipe,
    rule: UpdateRule,
    theta: Theta,
    families: Mapping[str, TaskFamily],
    worker: Worker,
    step: int,
) -> Estimated:
    """One worker's meta-gradient. Changes nothing: the worker afterwards is in the result."""
    start, after = time.monotonic(), replace(worker)
    fresh = after.generation < 0 or after.uses >= recipe.resample
    if fresh:
        after.generation, after.uses, after.unroll = after.generation + 1, 0, None
    if after.unroll is None:
        generator = generator_of(recipe.seed, "task", (after.number, after.generation))
        task = draw_task(recipe, families[after.family], generator)
        after.unroll = make_unroll(recipe, rule, task)
    unroll = replace(after.unroll, horizon=horizon_at(recipe, step))
    generator = generator_of(recipe.seed, "step", (step, after.number))
    carry = recipe.estimator.init(unroll, theta, generator) if fresh else after.carry
    loss, gradient, after.carry, metrics = recipe.estimator(unroll, theta, carry, generator)
    after.uses += 1
    return Estimated(after, float(loss), gradient, metrics, time.monotonic() - start)


# ------------------------------------------------------------------------------- the outer step


@dataclass
class Run:
    """All that changes during meta-training."""

    theta: Theta  # the leaves that the optimizer holds
    average: Theta
    optimizer: torch.optim.AdamW
    workers: list[Worker]
    step: int = 0
    validated: int = -1  # the last outer step at which theta was validated
    first: dict[str, float] = field(default_factory=dict)  # the scores of the start; empty where it was not validated
    fitted: int = 0  # the last outer step at which the lengths of theta were fitted
    best: dict[str, Any] = field(default_factory=dict)  # loss, step, theta
    norms: dict[str, float] = field(default_factory=dict)  # running mean square per family
    counters: dict[str, float] = field(default_factory=lambda: {"particle_steps": 0.0, "skipped": 0.0, "seconds": 0.0})
    log_bytes: int = 0
    costs: dict[str, float] = field(default_factory=dict)  # seconds of a family's last estimate; decides who makes it

    @classmethod
    def begin(cls, recipe: Recipe, theta: Theta) -> "Run":
        leaves = {n: t.detach().clone() for n, t in theta.items()}
        optimizer = torch.optim.AdamW(
            leaves.values(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        workers = [Worker(n, f) for n, f in enumerate(families_of_workers(recipe))]
        return cls(leaves, {n: t.clone() for n, t in leaves.items()}, optimizer, workers)

    def to_dict(self) -> dict[str, Any]:
        workers = [{"generation": w.generation, "uses": w.uses, "carry": w.carry} for w in self.workers]
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("optimizer", "workers", "costs")}
        return plain | {"optimizer": self.optimizer.state_dict(), "workers": workers}

    @classmethod
    def from_dict(cls, recipe: Recipe, data: dict[str, Any]) -> "Run":
        run = cls.begin(recipe, data["theta"])
        run.optimizer.load_state_dict(data["optimizer"])
        for worker, saved in zip(run.workers, data["workers"], strict=True):
            for name, value in saved.items():
                setattr(worker, name, value)
        for name in ("average", "step", "validated", "first", "fitted", "best", "norms", "counters", "log_bytes"):
            setattr(run, name, data[name])
        return run


def outer_step(recipe: Recipe, run: Run, parts: Sequence[Estimated]) -> dict[str, Any]:
    """Average the gradients, step theta, take over the workers. Returns what is logged."""
    gradients, skipped = [], 0
    for part in parts:
        run.workers[part.worker.number] = part.worker
        run.costs[part.worker.family] = part.seconds
        norm = float(torch.cat([g.flatten() for g in part.gradient.values()]).norm())
        if not (math.isfinite(norm) and math.isfinite(part.loss)):
            skipped += 1
            continue
        unit = _typical(recipe, run.norms, part.worker.family, norm)
        scale = 1 / unit * min(1.0, recipe.clip_gradient * unit / max(norm, 1e-30))
        gradients.append({n: g * scale for n, g in part.gradient.items()})
    lr = lr_at(recipe, run.step)
    norm = 0.0
    if gradients:
        for n, t in run.theta.items():
            t.grad = torch.stack([g[n] for g in gradients]).mean(0)
        norm = float(torch.nn.utils.clip_grad_norm_(run.theta.values(), recipe.clip_gradient))
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        run.optimizer.zero_grad()
    decay = min(recipe.ema, (1 + run.step) / (10 + run.step))
    for n, t in run.theta.items():
        if not bool(t.isfinite().all()):
            raise FloatingPointError(
                f"theta[{n!r}] is not finite after outer step {run.step}: the outer step was too "
                f"large. Lower lr (now {recipe.lr}) or clip_gradient (now {recipe.clip_gradient})."
            )
        run.average[n] = run.average[n].lerp(t, 1 - decay)
    run.step += 1
    run.counters["skipped"] += skipped
    run.counters["particle_steps"] += sum(p.metrics["particle_steps"] for p in parts)

    finite = [p for p in parts if math.isfinite(p.loss)]
    metrics: dict[str, Any] = {
        "step": run.step,
        "loss": mean([p.loss for p in finite]),
        "gradient_norm": norm,
        "lr": lr,
        "horizon": horizon_at(recipe, run.step - 1)[1],
        "skipped": run.counters["skipped"],
        "particle_steps": run.counters["particle_steps"],
    }
    for name in ("diverged", "clipped", "dropped"):
        metrics[name] = mean([p.metrics.get(name, 0.0) for p in parts])
    for family in sorted({p.worker.family for p in finite}):
        metrics[f"loss/{family}"] = mean([p.loss for p in finite if p.worker.family == family])
    return metrics


def pairs_of(
    recipe: Recipe, rule: UpdateRule, theta: Theta, families: Mapping[str, TaskFamily], step: int, number: int
) -> Pairs:
    """Runs of a fresh task with and without parts of theta, for fitting its lengths."""
    assert recipe.lengths is not None
    generator = generator_of(recipe.seed, "lengths", (step, number))
    order = families_of_workers(recipe)
    family = order[(step // recipe.lengths.every * recipe.lengths.tasks + number) % len(order)]
    steps = recipe.lengths.steps
    unroll = replace(make_unroll(recipe, rule, draw_task(recipe, families[family], generator)), horizon=(steps, steps))
    return compare(unroll, theta, recipe.lengths, generator)


def fit_lengths(run: Run, rule: UpdateRule, pairs: list[Pairs]) -> dict[str, float]:
    """Multiply the parts of theta by the factors that fit best. Returns these, and the change that they promise."""
    factors, change = best_factors(pairs)
    for kept in (run.theta, run.average):
        for n, t in scaled(rule, kept, factors).items():
            kept[n].data.copy_(t)
    run.fitted = run.step
    return dict(zip(rule.parts, factors.tolist(), strict=True)) | {"change": change}


def _typical(recipe: Recipe, norms: dict[str, float], family: str, norm: float) -> float:
    """Running RMS norm of a family's gradients, this one included; 1 if they are not normalised."""
    if not recipe.normalise:
        return 1.0
    before = norms.get(family, 0.0)
    # An explosion counts as ten times the usual, or it would silence the family for long.
    square = min(norm**2, 100 * before) if before else norm**2
    norms[family] = 0.95 * before + 0.05 * square if before else square
    return math.sqrt(norms[family]) or 1.0


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


# ------------------------------------------------------------------------------- parts of the loop


@dataclass
class _Work:
    """What one process, or all of them, did for an outer step."""

    parts: list[Estimated] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    pairs: dict[int, Pairs] = field(default_factory=dict)
    stopped_by: signal.Signals | None = None
    seconds: float = 0.0


def _joined(group: Processes, mine: _Work) -> _Work:
    """The work of all processes, its estimates in the order of the workers: the same everywhere."""
    own = {p.worker.number: p for p in mine.parts}
    portable = replace(mine, parts=[p.portable() for p in mine.parts])
    everyone = group.gather(portable)
    parts = [own.get(p.worker.number, p) for w in everyone for p in w.parts]
    return _Work(
        parts=sorted(parts, key=lambda p: p.worker.number),
        scores={n: v for w in everyone for n, v in w.scores.items()},
        pairs={n: v for w in everyone for n, v in w.pairs.items()},
        stopped_by=next((w.stopped_by for w in everyone if w.stopped_by is not None), None),
        seconds=everyone[0].seconds,
    )


def _fingerprints(recipe: Recipe, families: Mapping[str, TaskFamily]) -> dict[str, str]:
    """Of a task of each family, the same each time: so that a run does not go on with tasks of a changed file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # for tasks that draw their model from the global state
        return {n: task_fingerprint(families[n](generator_of(recipe.seed, "fingerprint", ()))) for n in recipe.families}


def _begin(
    recipe: Recipe,
    rule: UpdateRule,
    out: Path,
    resume: str,
    drawn: Mapping[str, str],
    group: Processes,
    report: Reporter,
) -> Run:
    """The run as process 0 finds it on its disk, or a new one."""
    found = group.from_first(lambda: _found(recipe, out, resume, drawn, report))
    if found is None:
        report.open(0, 0)
        return Run.begin(recipe, trained(recipe, rule))
    path, data = found
    run = Run.from_dict(recipe, data["run"])
    if set(data["recipe"].get("validation", ())) != set(recipe.validation):  # scores of other tasks do not compare
        run.best, run.first, run.validated = {}, {}, -1
    report.open(run.step, run.log_bytes)
    report.say(f"Continuing from {path} (outer step {run.step}).")
    return run


def _found(
    recipe: Recipe, out: Path, resume: str, drawn: Mapping[str, str], report: Reporter
) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint and where it is; RecipeError if it is of another recipe or of other tasks."""
    if resume == "never":
        if recipe.start is not None and Path(recipe.start).resolve() == (out / "theta.safetensors").resolve():
            raise RecipeError(f"{recipe.start}, to start from, is the result to delete. Use another folder.")
        report.clear()
        for path in checkpoint.list_all(out):
            path.unlink()
    latest = checkpoint.load_latest(out, report.say)
    if latest is None:
        return None
    path, data = latest
    old, new = data["recipe"], recipe.to_dict()
    changed = [k for k in new if k not in MAY_CHANGE and old.get(k) != new[k]]
    instead = "Use another folder, or delete that run with --resume never (in Python: resume='never')."
    if changed:
        raise RecipeError(f"{path} is of a recipe that differs in {', '.join(changed)}. {instead}")
    # a checkpoint of an earlier version holds none
    moved = [n for n, fingerprint in data.get("families", {}).items() if drawn[n] != fingerprint]
    if moved:
        raise RecipeError(
            f"the tasks of {', '.join(moved)} are not those of {path}: their code or data has changed. {instead}"
        )
    return latest


def _provenance(recipe: Recipe, run: Run, best: Mapping[str, Any], out: Path, count: int) -> dict[str, Any]:
    curve = jsonl.read(out / "log.jsonl")
    losses = [x["loss"] for x in curve if "gradient_norm" in x and x["loss"] is not None]
    tenth = max(1, len(losses) // 10)
    return {
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "git_commit": checkpoint.git_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "outer_steps": run.step,
        "particle_steps": run.counters["particle_steps"],
        "processes": count,
        "seconds": round(run.counters["seconds"], 1),
        "skipped_gradients": run.counters["skipped"],
        "meta_loss_first_tenth": mean(losses[:tenth]) if losses else None,
        "meta_loss_last_tenth": mean(losses[-tenth:]) if losses else None,
        "validation": [{"step": x["step"], "loss": x["validation"]} for x in curve if "validation" in x],
        "chosen": {"by": "validation", "step": best["step"], "loss": best["loss"]}
        if best
        else {"by": "last average", "step": run.step},
    }
