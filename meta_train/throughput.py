"""How fast a machine meta-trains a recipe, beside what its matrix products alone would allow."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

import tasks.suites
from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from meta_train.loop import Worker, estimate
from meta_train.recipes import Recipe, fresh_rule, known, trained
from tasks.task import TaskFamily


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
    say: Callable[[str], None] = lambda text: None,
) -> Throughput:
    """Measure one estimator call per family of the recipe, after one to warm up; ``say`` is told the progress.

    Raises:
        RecipeError: a rule or a family that the tables lack.
    """
    rules = RULES if rules is None else rules
    families = tasks.suites.TRAIN if families is None else families
    known("rule", [recipe.rule], rules)
    known("task family", recipe.families, families)
    rule = fresh_rule(recipe, rules)
    theta = trained(recipe, rule)
    recipe = replace(recipe, curriculum=0.0)
    rows = {}
    for number, family in enumerate(recipe.families):
        at = f"{family} ({number + 1} of {len(recipe.families)})"
        say(f"{at}: warming up")
        worker = estimate(recipe, rule, theta, families, Worker(number, family), 0).worker
        say(f"{at}: measuring")
        start = time.perf_counter()
        timed = estimate(recipe, rule, theta, families, worker, 1)
        seconds = time.perf_counter() - start
        say(f"{at}: {timed.metrics['particle_steps'] / seconds:.0f} particle-steps/s; counting operations")
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
