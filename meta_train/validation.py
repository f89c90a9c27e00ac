"""How good a theta is on given tasks: whole runs, the same ones each time."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from learned_opt.rules.base import UpdateRule
from meta_train.lengths import Theta
from meta_train.recipes import Recipe
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.task import Task, check_losses


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
        grid=recipe.grid,
    )


@torch.no_grad()
def score(recipe: Recipe, rule: UpdateRule, theta: Theta, name: str, task: Task) -> dict[str, float]:
    """``name``: log(train loss over the last tenth of a run / ceiling), mean of two runs, the same ones each time;
    ``held_out/<name>``: that of the final held-out loss."""
    steps = min(task.steps, recipe.validation_steps)
    unroll = replace(make_unroll(recipe, rule, task), horizon=(steps, steps), end_weight=0.0, measure="train")
    unroll = replace(unroll, transform="log", floor=1e-4)
    generator = generator_of(recipe.seed, f"validation {name}", ())
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
    return ordered | {"loss": sum(scores[p] for p in problems) / len(problems)}
