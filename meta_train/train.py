"""The meta-training loop: draw workers, estimate, average, step theta, log, checkpoint.

Nothing random has a state: every draw comes from a generator seeded by (seed, purpose, outer step,
worker), so a run that was interrupted, even killed, goes on as if it had not been.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import tasks.suites
from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.checkpoint import CheckpointError, load_theta, save_theta
from meta_train import checkpoint
from meta_train.estimators import Carry
from meta_train.recipes import Recipe
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.task import Task, TaskFamily

Theta = dict[str, Tensor]

MAY_CHANGE = ("outer_steps", "minutes", "checkpoint_every", "validate_every", "validation")
"""Fields of a recipe that may differ when a run is resumed."""


def generator_of(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A generator that depends on all arguments and on nothing else."""
    key = hashlib.sha256(repr((seed, purpose, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


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


def families_of_workers(recipe: Recipe) -> list[str]:
    """The family of each worker by the shares: always the one most behind is next."""
    total = sum(recipe.families.values())
    given = dict.fromkeys(recipe.families, 0)
    order = []
    for n in range(recipe.workers):
        behind = max(given, key=lambda f: recipe.families[f] / total * (n + 1) - given[f])
        given[behind] += 1
        order.append(behind)
    return order


def make_unroll(recipe: Recipe, rule: UpdateRule, task: Task) -> Unroll:
    """The inner problem of the recipe on a task."""
    return Unroll(
        task=task,
        rule=rule,
        symmetry=symmetry_of(task),
        horizon=recipe.horizon,
        end_weight=recipe.end_weight,
        transform=recipe.transform,
        clip=recipe.clip,
        floor=recipe.floor,
        measure=recipe.measure,
    )


def horizon_at(recipe: Recipe, step: int) -> tuple[int, int]:
    """Lowest and highest horizon at an outer step: the curriculum."""
    low, high = recipe.horizon
    grown = min(1.0, (step + 1) / max(1.0, recipe.curriculum * recipe.outer_steps))
    return low, round(low * (high / low) ** grown)


def lr_at(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine to ``final_lr`` of the peak."""
    warm = max(1.0, recipe.warmup * recipe.outer_steps)
    if step + 1 < warm:
        return recipe.lr * (step + 1) / warm
    progress = (step + 1 - warm) / max(1.0, recipe.outer_steps - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def chosen(recipe: Recipe, step: int) -> list[int]:
    """The workers of an outer step: all in a random order, then all again in another."""
    first, picked = step * recipe.tasks_per_step, []
    for k in range(first, first + recipe.tasks_per_step):
        generator = generator_of(recipe.seed, "order", k // recipe.workers)
        order = torch.randperm(recipe.workers, generator=generator)
        picked.append(int(order[k % recipe.workers]))
    return sorted(set(picked))  # one that ends a round and begins the next is used once


def estimate(
    recipe: Recipe,
    rule: UpdateRule,
    theta: Theta,
    families: Mapping[str, TaskFamily],
    worker: Worker,
    step: int,
) -> Estimated:
    """One worker's meta-gradient. Changes nothing: the worker afterwards is in the result."""
    after = replace(worker)
    fresh = after.generation < 0 or after.uses >= recipe.resample
    if fresh:
        after.generation, after.uses, after.unroll = after.generation + 1, 0, None
    if after.unroll is None:
        generator = generator_of(recipe.seed, "task", after.number, after.generation)
        after.unroll = make_unroll(recipe, rule, families[after.family](generator))
    unroll = replace(after.unroll, horizon=horizon_at(recipe, step))
    generator = generator_of(recipe.seed, "step", step, after.number)
    carry = recipe.estimator.init(unroll, theta, generator) if fresh else after.carry
    loss, gradient, after.carry, metrics = recipe.estimator(unroll, theta, carry, generator)
    after.uses += 1
    return Estimated(after, float(loss), gradient, metrics)


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
    best: dict[str, Any] = field(default_factory=dict)  # loss, step, theta
    norms: dict[str, float] = field(default_factory=dict)  # running mean square per family
    counters: dict[str, float] = field(default_factory=lambda: {"particle_steps": 0.0, "skipped": 0.0, "seconds": 0.0})
    log_bytes: int = 0

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
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("optimizer", "workers")}
        return plain | {"optimizer": self.optimizer.state_dict(), "workers": workers}

    @classmethod
    def from_dict(cls, recipe: Recipe, data: dict[str, Any]) -> "Run":
        run = cls.begin(recipe, data["theta"])
        run.optimizer.load_state_dict(data["optimizer"])
        for worker, saved in zip(run.workers, data["workers"], strict=True):
            for name, value in saved.items():
                setattr(worker, name, value)
        for name in ("average", "step", "validated", "best", "norms", "counters", "log_bytes"):
            setattr(run, name, data[name])
        return run


def outer_step(recipe: Recipe, run: Run, parts: Sequence[Estimated]) -> dict[str, Any]:
    """Average the gradients, step theta, take over the workers. Returns what is logged."""
    gradients, skipped = [], 0
    for part in parts:
        run.workers[part.worker.number] = part.worker
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
        "loss": _mean([p.loss for p in finite]),
        "gradient_norm": norm,
        "lr": lr,
        "horizon": horizon_at(recipe, run.step - 1)[1],
        "skipped": run.counters["skipped"],
        "particle_steps": run.counters["particle_steps"],
    }
    for name in ("diverged", "clipped", "dropped"):
        metrics[name] = _mean([p.metrics.get(name, 0.0) for p in parts])
    for family in sorted({p.worker.family for p in finite}):
        metrics[f"loss/{family}"] = _mean([p.loss for p in finite if p.worker.family == family])
    return metrics


def _typical(recipe: Recipe, norms: dict[str, float], family: str, norm: float) -> float:
    """Running RMS norm of a family's gradients, this one included; 1 if they are not normalised."""
    if not recipe.normalise:
        return 1.0
    before = norms.get(family, 0.0)
    # An explosion counts as ten times the usual, or it would silence the family for long.
    square = min(norm**2, 100 * before) if before else norm**2
    norms[family] = 0.95 * before + 0.05 * square if before else square
    return math.sqrt(norms[family]) or 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# ----------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(recipe: Recipe, rule: UpdateRule, theta: Theta, problems: Mapping[str, Task]) -> dict[str, float]:
    """log(train loss over the last tenth of a run / ceiling) per task, and the mean as ``loss``.

    Two runs a task, the same ones each time; ``held_out/<task>``: that of the final held-out loss.
    """
    result = {}
    for name, task in problems.items():
        steps = min(task.steps, recipe.validation_steps)
        unroll = replace(make_unroll(recipe, rule, task), horizon=(steps, steps), end_weight=0.0, measure="train")
        unroll = replace(unroll, transform="log", floor=1e-4)
        generator = generator_of(recipe.seed, f"validation {name}")
        # The run ends one step before its horizon: at the horizon the weights would be fresh ones.
        particles, trace = unroll(theta, unroll.init(2, generator), steps - 1, generator)
        result[name] = float(trace.loss[-max(1, steps // 10) :].mean())
        held_out = [task.loss({n: p[i] for n, p in particles["params"].items()}, task.held_out()) for i in range(2)]
        result[f"held_out/{name}"] = float(unroll._normalise(torch.stack(held_out)).mean())
    result["loss"] = _mean([v for n, v in result.items() if not n.startswith("held_out/")])
    return result


# ------------------------------------------------------------------------------------- the loop


def train(
    recipe: Recipe,
    out: Path,
    resume: Literal["auto", "never"] = "auto",
    *,
    rules: Mapping[str, Callable[[], UpdateRule]] | None = None,
    families: Mapping[str, TaskFamily] | None = None,
    validation: Mapping[str, Callable[[], Task]] | None = None,
) -> Path:
    """Meta-train by a recipe.

    ``out`` receives ``theta.safetensors`` (the result), ``log.jsonl``, ``tensorboard/`` and
    the last two checkpoints. Ctrl-C or SIGTERM: the step under way is given up, the run is saved
    and the process exits with 130 or 143; a second one ends it at once.

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
        ValueError: the recipe names a rule, family or task that does not exist, or the checkpoint
            in ``out`` is of another recipe.
        CheckpointError: no checkpoint in ``out`` is whole, or ``recipe.start`` cannot be used.
        FloatingPointError: theta became non-finite.
    """
    out = Path(out)
    rules = RULES if rules is None else rules
    families = tasks.suites.TRAIN if families is None else families
    validation = tasks.suites.VALID if validation is None else validation
    _known("rule", [recipe.rule], rules)
    _known("task family", recipe.families, families)
    _known("validation task", recipe.validation, validation)
    rule = _fresh_rule(recipe, rules)
    if not dict(rule.named_parameters()):
        raise ValueError(f"rule {recipe.rule!r} has no theta to train. Choose a learned rule.")
    _known("part of theta", recipe.trained, dict(rule.named_children()) | dict(rule.named_parameters()))

    with _Reporter(out, recipe.outer_steps) as report, _Interruption() as interruption:
        run = _resume(recipe, rule, out, resume, report)
        started = time.monotonic() - run.counters["seconds"]
        problems = {n: make() for n, make in validation.items() if n in (recipe.validation or validation)}
        problems = problems if recipe.validate_every else {}
        saved = run.step

        def save() -> Path:
            run.counters["seconds"] = time.monotonic() - started
            run.log_bytes = report.flush()
            return checkpoint.save(out, run.step, {"recipe": recipe.to_dict(), "run": run.to_dict()})

        def expired() -> bool:
            seconds = time.monotonic() - started
            return recipe.minutes is not None and seconds >= 60 * recipe.minutes

        def validation_is_due(last: bool) -> bool:
            due = last or run.step % max(1, recipe.validate_every) == 0
            return bool(problems) and due and run.validated < run.step

        while True:
            over = run.step >= recipe.outer_steps or expired()
            # What may take long changes nothing, so a signal may end it anywhere.
            with interruption.may_end_this():
                if validation_is_due(over):
                    scores = validate(recipe, rule, run.average, problems)
                parts = [] if over else [
                    estimate(recipe, rule, run.theta, families, run.workers[n], run.step)
                    for n in chosen(recipe, run.step)
                ]  # fmt: skip
            if interruption.signal is not None:
                report.say(
                    f"Stopped by {interruption.signal.name} after outer step {run.step}; saved in "
                    f"{save()}. The same command continues from there."
                )
                raise SystemExit(128 + interruption.signal)
            if validation_is_due(over):
                if not run.best or scores["loss"] < run.best["loss"]:
                    theta = {n: t.clone() for n, t in run.average.items()}
                    run.best = {"loss": scores["loss"], "step": run.step, "theta": theta}
                run.validated = run.step
                report.validated(run, scores)
            if over:
                break
            metrics = outer_step(recipe, run, parts)
            report.stepped(metrics, time.monotonic() - started)
            if run.step - saved >= recipe.checkpoint_every:
                save()
                saved = run.step

        save()
        trained = run.best["theta"] if run.best else run.average
        theta = {**dict(rule.named_parameters()), **trained}
        path = out / "theta.safetensors"
        save_theta(path, recipe.rule, theta, _provenance(recipe, run, out))
        report.say(f"{run.step} outer steps in {run.counters['seconds']:.0f} s: {path}")
    return path


def _known(kind: str, names: Any, table: Mapping[str, Any]) -> None:
    unknown = [n for n in names if n not in table]
    if unknown:
        raise ValueError(f"unknown {kind} {', '.join(unknown)}. Choose from {', '.join(table)}.")


def _fresh_rule(recipe: Recipe, rules: Mapping[str, Callable[[], UpdateRule]]) -> UpdateRule:
    """The rule with freshly drawn theta, or with that of ``recipe.start``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        rule = rules[recipe.rule]()
    if recipe.start is not None:
        name, theta, _ = load_theta(recipe.start)
        if name != recipe.rule:
            raise CheckpointError(recipe.start, f"it is of rule {name!r}, not {recipe.rule!r}.")
        try:
            rule.load_state_dict(theta)
        except RuntimeError as error:
            raise CheckpointError(recipe.start, f"it does not fit the rule ({error}).") from error
    return rule.requires_grad_(False)


def _trained(recipe: Recipe, rule: UpdateRule) -> dict[str, Tensor]:
    """The part of theta that the recipe trains; the rule keeps the rest."""
    return {
        n: p.detach()
        for n, p in rule.named_parameters()
        if not recipe.trained or {n, n.split(".")[0]} & set(recipe.trained)
    }


def _resume(recipe: Recipe, rule: UpdateRule, out: Path, resume: str, report: "_Reporter") -> Run:
    if resume == "never":
        report.clear()
        for path in checkpoint.list_all(out):
            path.unlink()
    found = checkpoint.load_latest(out, report.say)
    if found is None:
        report.open(0, 0)
        return Run.begin(recipe, _trained(recipe, rule))
    path, data = found
    old, new = data["recipe"], recipe.to_dict()
    changed = [k for k in new if k not in MAY_CHANGE and old.get(k) != new[k]]
    if changed:
        raise ValueError(
            f"{path} is of a recipe that differs in {', '.join(changed)}. Use another folder, or "
            "resume='never' to delete that run."
        )
    run = Run.from_dict(recipe, data["run"])
    report.open(run.step, run.log_bytes)
    report.say(f"Continuing from {path} (outer step {run.step}).")
    return run


def _provenance(recipe: Recipe, run: Run, out: Path) -> dict[str, Any]:
    curve = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
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
        "seconds": round(run.counters["seconds"], 1),
        "skipped_gradients": run.counters["skipped"],
        "meta_loss_first_tenth": _mean(losses[:tenth]) if losses else None,
        "meta_loss_last_tenth": _mean(losses[-tenth:]) if losses else None,
        "validation": [{"step": x["step"], "loss": x["validation"]} for x in curve if "validation" in x],
        "chosen": {"by": "validation", "step": run.best["step"], "loss": run.best["loss"]}
        if run.best
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


# --------------------------------------------------------------------------- signals and reports


class _Stopped(BaseException):
    """Raised by the signal handler inside work that may be given up."""


class _Interruption(contextlib.AbstractContextManager["_Interruption"]):
    """SIGINT and SIGTERM become ``signal``; a second one exits at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._may_raise = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Interruption":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for s in (signal.SIGINT, signal.SIGTERM):
                self._before[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        if self._may_raise:
            raise _Stopped

    @contextlib.contextmanager
    def may_end_this(self) -> Iterator[None]:
        """Work that changes nothing: a signal ends it where it is; the code goes on after it."""
        try:
            if self.signal is None:
                self._may_raise = True
                yield
                self._may_raise = False
            else:
                yield
        except _Stopped:
            pass
        finally:
            self._may_raise = False


class _Reporter(contextlib.AbstractContextManager["_Reporter"]):
    """log.jsonl, TensorBoard, and a progress bar or, where there is no terminal, plain lines."""

    def __init__(self, out: Path, total: int) -> None:
        self.out, self.total = out, total
        self.console = Console(stderr=False)
        self.bar: Progress | None = None
        self.log: Any = None
        self.board: Any = None
        self._printed = -math.inf
        self._last = (0.0, 0.0)  # seconds and particle-steps at the last report

    def __enter__(self) -> "_Reporter":
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def clear(self) -> None:
        """Delete what an earlier run logged."""
        for path in [self.out / "log.jsonl", *self.out.glob("tensorboard/events.out.tfevents.*")]:
            path.unlink(missing_ok=True)

    def open(self, step: int, log_bytes: int) -> None:
        """Start, or go on after outer step ``step``, forgetting what was logged since."""
        path = self.out / "log.jsonl"
        path.touch()
        os.truncate(path, log_bytes)
        self.log = path.open("a", buffering=1)  # whole lines, also when killed
        self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.bar.add_task("meta-training", total=self.total, completed=step)
            self.bar.start()

    def __exit__(self, *_: object) -> None:
        for thing in (self.log, self.board):
            if thing is not None:
                thing.close()
        if self.bar is not None:
            self.bar.stop()

    def flush(self) -> int:
        """Everything logged is on disk; returns the length of the log in bytes."""
        self.log.flush()
        return self.log.tell()

    def say(self, text: str) -> None:
        """One line to the user."""
        if self.bar is not None:
            self.bar.console.print(text, soft_wrap=True, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def stepped(self, metrics: dict[str, Any], seconds: float) -> None:
        """Log an outer step."""
        before, count = self._last
        rate = (metrics["particle_steps"] - count) / max(seconds - before, 1e-9)
        self._last = (seconds, metrics["particle_steps"])
        self._write(metrics | {"seconds": round(seconds, 3)})
        scalars = {k: v for k, v in metrics.items() if k != "step"}
        if count:  # the first interval includes start-up
            scalars["particle_steps_per_second"] = rate
        scalars["memory_MB"] = _peak_memory()
        for name, value in scalars.items():
            self.board.add_scalar(name, value, metrics["step"])
        text = f"loss {metrics['loss']:.4f}"
        if self.bar is not None:
            task = self.bar.task_ids[0]
            self.bar.update(task, completed=metrics["step"], description=text)
        elif seconds - self._printed >= 10 or metrics["step"] == self.total:
            self._printed = seconds
            self.say(
                f"step {metrics['step']}/{self.total}  {text}  gradient "
                f"{metrics['gradient_norm']:.3g}  diverged {metrics['diverged']:.1%}  "
                f"{rate:.0f} particle-steps/s  {seconds:.0f} s"
            )

    def validated(self, run: Run, scores: dict[str, float]) -> None:
        """Log a validation."""
        tasks_ = {n: v for n, v in scores.items() if n != "loss"}
        self._write({"step": run.step, "validation": scores["loss"], "tasks": tasks_})
        for name, value in scores.items():
            self.board.add_scalar(f"validation/{name}", value, run.step)
        best = " (best)" if run.best["step"] == run.step else ""
        self.say(f"step {run.step}/{self.total}  validation {scores['loss']:.4f}{best}")

    def _write(self, line: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.log.write(json.dumps(finite) + "\n")


def _peak_memory() -> float:
    """Highest resident memory of the process so far, MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ----------------------------------------------------------------------------------- throughput


@dataclass(frozen=True)
class Throughput:
    """Particle-steps per second of a recipe, beside what its matrix products alone would allow."""

    families: dict[str, dict[str, float]]
    peak: float  # FLOP/s of a large matrix product on this machine, this number of threads

    def __str__(self) -> str:
        lines = [
            f"Matrix peak: {self.peak / 1e9:.1f} GFLOP/s, {torch.get_num_threads()} threads",
            f"{'family':<14}{'weights':>9}{'steps/s':>10}{'us/step':>10}{'kFLOP/step':>12}"
            f"{'bound us':>10}{'of bound':>10}",
        ]
        for name, row in self.families.items():
            bound = row["flop"] / self.peak
            lines.append(
                f"{name:<14}{row['weights']:>9.0f}{row['rate']:>10.0f}{1e6 / row['rate']:>10.0f}"
                f"{row['flop'] / 1e3:>12.0f}{1e6 * bound:>10.1f}{bound * row['rate']:>10.1%}"
            )
        lines.append(
            "A step is one particle-step: inner gradient, rule, its share of the meta-gradient. "
            "The bound counts matrix products and convolutions only."
        )
        return "\n".join(lines)


def throughput(
    recipe: Recipe,
    *,
    rules: Mapping[str, Callable[[], UpdateRule]] | None = None,
    families: Mapping[str, TaskFamily] | None = None,
) -> Throughput:
    """Measure one estimator call per family of the recipe, after one to warm up."""
    rule = _fresh_rule(recipe, RULES if rules is None else rules)
    families = tasks.suites.TRAIN if families is None else families
    theta = _trained(recipe, rule)
    recipe = replace(recipe, curriculum=0.0)
    rows = {}
    for number, family in enumerate(recipe.families):
        worker = estimate(recipe, rule, theta, families, Worker(number, family), 0).worker
        start = time.perf_counter()
        timed = estimate(recipe, rule, theta, families, worker, 1)
        seconds = time.perf_counter() - start
        with FlopCounterMode(display=False) as counter:
            counted = estimate(recipe, rule, theta, families, worker, 1)
        assert worker.unroll is not None
        rows[family] = {
            "weights": float(sum(p.numel() for p in worker.unroll.task.model.parameters())),
            "rate": timed.metrics["particle_steps"] / seconds,
            "flop": counter.get_total_flops() / counted.metrics["particle_steps"],
        }
    return Throughput(rows, _matmul_peak())


def _matmul_peak(size: int = 768, repeats: int = 5) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
