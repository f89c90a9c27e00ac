"""The meta-training loop: estimate, step theta, validate, log, checkpoint; in one process or several."""

import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import tasks.suites
from learned_opt.rules import RULES, SHIPPED
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.checkpoint import CheckpointError, load_theta, save_theta
from meta_train import checkpoint, jsonl
from meta_train.bench.report import draw_training
from meta_train.bench.suites import task_fingerprint
from meta_train.outer import Estimated, Run, chosen, estimate, generator_of, mean, outer_step, score, with_mean
from meta_train.processes import Processes, processes
from meta_train.progress import Interruption, Reporter
from meta_train.recipes import SHIPPED_THETA, Recipe, RecipeError
from tasks.task import Task, TaskFamily

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
    known("part of theta", recipe.trained, dict(rule.named_children()) | dict(rule.named_parameters()))

    with processes() as group, Reporter(out, recipe.outer_steps, group.rank == 0) as report, Interruption() as told:
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
            due = bool(problems) and run.validated < run.step and (over or run.step % recipe.validate_every == 0)
            mine = _Work()
            # What may take long changes nothing, so a signal may end it anywhere.
            with told.may_end_this():
                for name in group.deal(list(problems) if due else [], {n: t.steps for n, t in problems.items()}):
                    mine.scores |= score(recipe, rule, run.average, name, problems[name])
                cost = {n: run.costs.get(run.workers[n].family, 1.0) for n in range(recipe.workers)}
                for n in group.deal([] if over else chosen(recipe, run.step), cost):
                    mine.parts.append(estimate(recipe, rule, run.theta, families, run.workers[n], run.step))
            mine.stopped_by, mine.seconds = told.signal, time.monotonic() - started
            work = _joined(group, mine)

            run.counters["seconds"] = work.seconds
            if work.stopped_by is not None:
                report.say(
                    f"Stopped by {work.stopped_by.name} after outer step {run.step}; saved in "
                    f"{save()}. The same command continues from there."
                )
                raise SystemExit(128 + work.stopped_by)
            if due:
                scores = with_mean(work.scores, problems)
                run.validated = run.step
                if not run.best or scores["loss"] < run.best["loss"]:
                    theta = {n: t.clone() for n, t in run.average.items()}
                    run.best = {"loss": scores["loss"], "step": run.step, "theta": theta}
                report.validated(run.step, scores, best=run.best["step"] == run.step)
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
            save_theta(path, recipe.rule, theta, _provenance(recipe, run, best, out, group.count))
            draw_training(out)
        report.say(f"{run.step} outer steps in {run.counters['seconds']:.0f} s: {path}")
    return path


@dataclass
class _Work:
    """What one process, or all of them, did for an outer step."""

    parts: list[Estimated] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
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
        stopped_by=next((w.stopped_by for w in everyone if w.stopped_by is not None), None),
        seconds=everyone[0].seconds,
    )


def known(kind: str, names: Iterable[str], table: Mapping[str, Any]) -> None:
    """Raises RecipeError unless all names are in the table."""
    unknown = [n for n in names if n not in table]
    if unknown:
        raise RecipeError(f"unknown {kind} {', '.join(unknown)}. Choose from {', '.join(table)}.")


def fresh_rule(recipe: Recipe, rules: Mapping[str, Callable[[], UpdateRule]]) -> UpdateRule:
    """The rule with freshly drawn theta, or with that of ``recipe.start``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        rule = rules[recipe.rule]()
    if recipe.start is not None:
        shipped = recipe.start == SHIPPED_THETA
        name, theta, _ = load_theta(SHIPPED / f"{recipe.rule}.safetensors" if shipped else recipe.start)
        if name != recipe.rule:
            raise CheckpointError(recipe.start, f"it is of rule {name!r}, not {recipe.rule!r}.")
        try:
            rule.load_state_dict(theta)
        except RuntimeError as error:
            raise CheckpointError(recipe.start, f"it does not fit the rule ({error}).") from error
    return rule.requires_grad_(False)


def trained(recipe: Recipe, rule: UpdateRule) -> dict[str, Tensor]:
    """The part of theta that the recipe trains; the rule keeps the rest."""
    return {
        n: p.detach()
        for n, p in rule.named_parameters()
        if not recipe.trained or {n, n.split(".")[0]} & set(recipe.trained)
    }


def _fingerprints(recipe: Recipe, families: Mapping[str, TaskFamily]) -> dict[str, str]:
    """Of a task of each family, the same each time: so that a run does not go on with tasks of a changed file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # for tasks that draw their model from the global state
        return {n: task_fingerprint(families[n](generator_of(recipe.seed, "fingerprint"))) for n in recipe.families}


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
        run.best, run.validated = {}, -1
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
        "git_commit": _git_commit(),
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


def _git_commit() -> str | None:
    """HEAD of the checkout that this code is in, marked if files differ; None outside of one."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + (" with changes" if dirty.returncode else "")
