"""Recipes: all that decides a meta-training run, as plain data, returned by functions.

Variants are made with ``dataclasses.replace``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from learned_opt.checkpoint import CheckpointError, load_weights
from learned_opt.rules import SHIPPED
from learned_opt.rules.base import UpdateRule
from meta_train.augmentation import AUGMENTATIONS
from meta_train.errors import UsageError
from meta_train.estimators import ES, ESTIMATORS, PES, TBPTT, CoolDown, TruncatedES
from meta_train.lengths import Lengths
from tasks.schedule import half_cosine
from tasks.seeds import generator_of

SHIPPED_THETA = "shipped"
"""As ``start`` of a recipe: the theta in the package, of rules that have one."""


RATES = ("lr", "warmup", "final_lr", "weight_decay", "validate_every", "curriculum")  # 0 or more, and finite


class RecipeError(UsageError):
    """A recipe cannot be followed; the message says what to change."""


@dataclass(frozen=True)
class Recipe:
    """One meta-training run. It serialises to JSON with :meth:`to_dict`.

    Attributes:
        rule: name in ``learned_opt.rules.RULES``; training starts from its freshly drawn theta.
        start: path of a ``.safetensors`` theta of that rule to start from instead, or "shipped" for the package's.
        trained: parts of theta (names of the rule's modules or parameters) that are trained; empty: all.
            Evolution strategies pay for every number that they perturb, so a rule whose hidden maps
            stay random learns more from the same work.
        families: name in ``tasks.suites.TRAIN`` and its share of the workers.
        augmentation: how sampled tasks are reparametrised, see :mod:`meta_train.augmentation`.
        augmentation_scale: the largest factor, its inverse the smallest.
        estimator: of the meta-gradient, with the particles per task and the truncation.
        lengths: when and how the length of theta is fitted on whole runs (:mod:`meta_train.lengths`); None: never.
        horizon: lowest and highest number of inner steps of a run, drawn log-uniformly.
        curriculum: fraction of the outer steps over which the highest horizon grows geometrically
            from the lowest.
        end_weight: see :class:`meta_train.unroll.Unroll`; also the next five.
        workers: persistent tasks, each with its particles.
        tasks_per_step: workers whose meta-gradients are averaged in an outer step.
        resample: uses of a worker after which it gets a new task.
        outer_steps: number of steps of theta.
        lr: outer learning rate at its peak; linear warm-up over ``warmup`` (a fraction of the outer
            steps), then cosine to ``final_lr`` times the peak.
        weight_decay: of AdamW on theta; pulls last maps toward zero, where the rule is the hand-made one.
        betas: of AdamW.
        clip_gradient: norm to which each task's gradient and then their mean is cut; in units of
            the family's typical norm if ``normalise``.
        normalise: divide each task's gradient by the running RMS norm of its family's gradients.
        ema: decay of the average of theta that is validated and returned; 0 takes theta itself.
        validate_every: outer steps between validations; 0: none. With them, the best theta is the
            result.
        validation: names in ``tasks.suites.VALID``; empty: all.
        validation_steps: at most this many inner steps per validation run.
        checkpoint_every: outer steps between checkpoints.
        minutes: wall-clock limit over all sessions of the run; None: no limit.
        seed: of everything.
    """

    rule: str = "learned"
    start: str | None = None
    trained: tuple[str, ...] = ()
    families: dict[str, float] = field(
        default_factory=lambda: {
            "mlp": 1.0,
            "autoencoder": 1.0,
            "cnn": 1.0,
            "char": 1.0,
            "vit": 1.0,
        }
    )
    augmentation: Literal["none", "units", "global"] = "none"
    augmentation_scale: float = 100.0
    estimator: TBPTT | CoolDown | ES | TruncatedES | PES = field(default_factory=PES)
    lengths: Lengths | None = None
    horizon: tuple[int, int] = (100, 1000)
    curriculum: float = 0.3
    end_weight: float = 2.0
    transform: Literal["clip", "log"] = "log"
    clip: float = 1.5
    floor: float = 1e-2
    measure: Literal["train", "fresh", "held_out"] = "train"
    grid: int = 1
    workers: int = 10
    tasks_per_step: int = 4
    resample: int = 60
    outer_steps: int = 2000
    lr: float = 3e-3
    warmup: float = 0.05
    final_lr: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_gradient: float = 3.0
    normalise: bool = True
    ema: float = 0.98
    validate_every: int = 0
    validation: tuple[str, ...] = ()
    validation_steps: int = 400
    checkpoint_every: int = 20
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.horizon
        rates = {n: getattr(self, n) for n in RATES}
        checks = {
            "families must name at least one family with a positive share": bool(self.families)
            and all(share > 0 for share in self.families.values()),
            f"horizon {self.horizon} must have 1 <= lowest <= highest": 1 <= low <= high,
            f"tasks_per_step {self.tasks_per_step} must be from 1 to workers {self.workers}": 1
            <= self.tasks_per_step
            <= self.workers,
            "outer_steps, resample and checkpoint_every must be positive": min(
                self.outer_steps, self.resample, self.checkpoint_every
            )
            > 0,
            f"validation_steps {self.validation_steps} must be 2 or more": self.validation_steps >= 2,
            f"clip_gradient {self.clip_gradient} must be positive": self.clip_gradient > 0,
            f"minutes {self.minutes} must be 0 or more": self.minutes is None or self.minutes >= 0,
            f"betas {self.betas} must be in [0, 1)": all(0 <= beta < 1 for beta in self.betas),
            **{f"{n} {value} must be 0 or more, and finite": 0 <= value < math.inf for n, value in rates.items()},
            f"0 <= floor {self.floor} < clip {self.clip} must hold, and floor > 0 for 'log'": (
                0 <= self.floor < self.clip and (self.floor > 0 or self.transform != "log")
            ),
            f"ema {self.ema} must be in [0, 1)": 0 <= self.ema < 1,
            f"grid {self.grid} must be 1 or more": self.grid >= 1,
            f"augmentation {self.augmentation!r} must be one of {', '.join(AUGMENTATIONS)}": self.augmentation
            in AUGMENTATIONS,
            f"augmentation_scale {self.augmentation_scale} must be 1 or more": self.augmentation_scale >= 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise RecipeError(f"Recipe: {message}. Pass another value.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON): tuples as lists, the estimator with its ``kind``."""
        data = asdict(self)
        data["estimator"] = {"kind": type(self.estimator).__name__, **data["estimator"]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """The inverse of :meth:`to_dict`."""
        settings = dict(data["estimator"])
        estimator = ESTIMATORS[settings.pop("kind")](**settings)
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        plain["estimator"] = estimator
        plain["lengths"] = Lengths(**data["lengths"]) if data.get("lengths") else None
        return cls(**plain)


# ------------------------------------------------------------------------ what a recipe says of rule and outer steps
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
        name, theta, _ = load_weights(SHIPPED / f"{recipe.rule}.safetensors" if shipped else recipe.start)
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
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * half_cosine(min(1.0, progress)))


def chosen(recipe: Recipe, step: int) -> list[int]:
    """The workers of an outer step: all in a random order, then all again in another."""
    first, picked = step * recipe.tasks_per_step, []
    for k in range(first, first + recipe.tasks_per_step):
        generator = generator_of(recipe.seed, "order", (k // recipe.workers,))
        order = torch.randperm(recipe.workers, generator=generator)
        picked.append(int(order[k % recipe.workers]))
    return sorted(set(picked))  # one that ends a round and begins the next is used once


# --------------------------------------------------------------------------------------------- the recipes
def tbptt() -> Recipe:
    """Truncated backpropagation, first order: low variance, blind beyond the truncation."""
    return Recipe(
        estimator=TBPTT(particles=8, truncation=20, remat=True, outlier=3.0),
        end_weight=0.0,
        validate_every=100,
    )


def hybrid() -> Recipe:
    """Directions of theta by truncated backpropagation, their lengths by whole runs, in turns (experiments, 54)."""
    return Recipe(
        families={
            "mlp": 2.0,
            "mlp-inputs": 2.0,
            "autoencoder": 2.0,
            "cnn": 2.0,
            "residual-mlp": 1.0,
            "resnet": 0.5,
            "char": 0.5,
            "vit": 0.5,
            "rnn": 0.5,
            "stream-mlp": 1.0,
            "stream-regression": 1.0,
            "stream-cnn": 0.5,
            "stream-transformer": 0.5,
            "stream-graph": 1.0,
            "experts": 1.0,
        },
        estimator=CoolDown(),
        lengths=Lengths(every=30),
        horizon=(100, 2000),
        curriculum=0.0,
        end_weight=0.0,
        floor=1e-3,
        grid=10,
        workers=28,
        tasks_per_step=4,
        resample=20,
        outer_steps=120,
        lr=0.01,
        clip_gradient=1.0,
        weight_decay=0.0,
        ema=0.9,
        checkpoint_every=10,
        validate_every=30,
        validation=("mlp-digits-relu", "mlp-photos-tanh", "autoencoder-photos", "cnn-digits-relu", "vit-digits"),
        validation_steps=300,
    )


def pes() -> Recipe:
    """Persistent evolution strategies: unbiased over whole runs; start it from a TBPTT theta."""
    return Recipe(
        estimator=PES(particles=8, truncation=50, sigma=0.02),
        lr=1e-3,
        outer_steps=5000,
        validate_every=200,
    )


def es() -> Recipe:
    """Whole runs under antithetic perturbations, judged by where they end."""
    return Recipe(
        estimator=ES(particles=8, sigma=0.02),
        horizon=(100, 500),
        end_weight=8.0,
        curriculum=0.5,
        tasks_per_step=2,
        outer_steps=1000,
        validate_every=100,
    )


def general() -> Recipe:
    """For tasks of many kinds: whole runs judged by where they end, on fresh tasks."""
    return Recipe(
        trained=("tensor_controls", "unit_controls"),
        families={
            "mlp-inputs": 4.0,  # what few inputs teach about rates is wrong for many
            "mlp": 3.0,
            "cnn": 3.0,
            "autoencoder": 2.0,
            "residual-mlp": 2.0,
            "char": 1.5,
            "vit": 1.5,
            "resnet": 1.5,
            "rnn": 1.5,
        },
        estimator=ES(particles=16, sigma=0.05),
        horizon=(200, 700),
        curriculum=0.0,
        end_weight=8.0,
        workers=20,
        tasks_per_step=2,
        resample=1,
        outer_steps=60,
        lr=0.005,  # theta goes a third as far as at 0.015 (experiments, 44)
        ema=0.9,
        checkpoint_every=5,
    )


def finetune(*families: str) -> Recipe:
    """From the hand-made rule, where a fresh theta is, to one kind of task, in few outer steps.

    Many particles of one small network cost little more than a few, and say more of the gradient. The size of the
    perturbations is that of regressions (experiments, 45); residual MLPs wanted a third of it (46).

    Args:
        families: names of the task families; all equally often.
    """
    return replace(
        general(),
        families=dict.fromkeys(families or ("mlp",), 1.0),
        estimator=ES(particles=64, sigma=0.15),
        workers=max(4, len(families)),
        tasks_per_step=1,
        outer_steps=40,
        lr=0.02,
    )


def demo() -> Recipe:
    """About a minute: a few outer steps on small MLPs and autoencoders, to see the loop at work."""
    return replace(
        tbptt(),
        families={"mlp": 1.0, "autoencoder": 1.0},
        estimator=TBPTT(particles=2, truncation=10, remat=True, outlier=3.0),
        horizon=(20, 100),
        workers=4,
        tasks_per_step=2,
        outer_steps=40,
        checkpoint_every=10,
        validate_every=0,
        minutes=1.0,
    )


def tiny() -> Recipe:
    """Seconds; for tests."""
    return replace(
        demo(),
        families={"mlp": 1.0},
        estimator=TBPTT(particles=2, truncation=4, outlier=3.0),
        horizon=(6, 12),
        workers=2,
        tasks_per_step=1,
        resample=3,
        outer_steps=4,
        checkpoint_every=2,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "tiny": tiny,
    "tbptt": tbptt,
    "hybrid": hybrid,
    "pes": pes,
    "es": es,
    "general": general,
    "finetune": finetune,
}
