"""One outer step: workers with their tasks and particles, their meta-gradients, the step of theta, validation.

Nothing random has a state: every draw comes from a generator seeded by (seed, purpose, outer step,
worker), so a worker's estimate is the same in whichever process it is made, and a run that was interrupted, even
killed, goes on as if it had not been.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from learned_opt.rules.base import UpdateRule
from meta_train.augmentation import augmented
from meta_train.estimators import Carry
from meta_train.recipes import Recipe
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.task import Task, TaskFamily, check_losses

Theta = dict[str, Tensor]


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
    seconds: float = 0.0

    def portable(self) -> "Estimated":
        """For another process: without the task, which the seed gives there too."""
        return replace(self, worker=replace(self.worker, unroll=None))


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
    start, after = time.monotonic(), replace(worker)
    fresh = after.generation < 0 or after.uses >= recipe.resample
    if fresh:
        after.generation, after.uses, after.unroll = after.generation + 1, 0, None
    if after.unroll is None:
        generator = generator_of(recipe.seed, "task", after.number, after.generation)
        task = families[after.family](generator)
        task = augmented(task, recipe.augmentation, recipe.augmentation_scale, generator)
        after.unroll = make_unroll(recipe, rule, task)
    unroll = replace(after.unroll, horizon=horizon_at(recipe, step))
    generator = generator_of(recipe.seed, "step", step, after.number)
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
        for name in ("average", "step", "validated", "best", "norms", "counters", "log_bytes"):
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


# ----------------------------------------------------------------------------------- validation


@torch.no_grad()
def score(recipe: Recipe, rule: UpdateRule, theta: Theta, name: str, task: Task) -> dict[str, float]:
    """``name``: log(train loss over the last tenth of a run / ceiling), mean of two runs, the same ones each time;
    ``held_out/<name>``: that of the final held-out loss."""
    steps = min(task.steps, recipe.validation_steps)
    unroll = replace(make_unroll(recipe, rule, task), horizon=(steps, steps), end_weight=0.0, measure="train")
    unroll = replace(unroll, transform="log", floor=1e-4)
    generator = generator_of(recipe.seed, f"validation {name}")
    # The run ends one step before its horizon: at the horizon the weights would be fresh ones.
    particles, trace = unroll(theta, unroll.init(2, generator), steps - 1, generator)
    each = [task.loss({n: p[i] for n, p in particles["params"].items()}, task.held_out()) for i in range(2)]
    held_out = torch.where(trace.raw[-1].isfinite(), torch.stack(each), torch.nan)  # a diverged run is a fresh one now
    check_losses(task, held_out)
    return {
        name: float(trace.loss[-max(1, steps // 10) :].mean()),
        f"held_out/{name}": float(unroll._normalise(held_out).mean()),
    }


def with_mean(scores: Mapping[str, float], problems: Mapping[str, Task]) -> dict[str, float]:
    """The scores in the order of the problems, and the mean over these as ``loss``."""
    ordered = {n: scores[n] for p in problems for n in (p, f"held_out/{p}")}
    return ordered | {"loss": mean([scores[p] for p in problems])}
