"""Several seeds of a task trained at once, in about half the time of ordinary loops: for experiments on rules."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from learned_opt.rules.base import UpdateRule
from meta_train.bench.curves import evaluation_batches
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.task import Task


@torch.no_grad()
def final_losses(task: Task, rule: UpdateRule, seeds: int, steps: int | None = None) -> list[float]:
    """Final train losses; initial weights and data are the same for every rule, whatever the number of steps.

    Args:
        task: the problem; its own number of steps unless ``steps`` says otherwise.
        rule: with its theta.
        seeds: runs.
        steps: of each, and the horizon that the rule is told.
    """
    steps = steps or task.steps
    generator = torch.Generator().manual_seed(1234)
    unroll = Unroll(task, rule, symmetry_of(task), (steps, steps))
    particles = unroll.init(seeds, generator, common=True)
    particles["stop"] = particles["stop"] + 1  # at the horizon the weights would be fresh ones
    theta = {n: p.detach() for n, p in rule.named_parameters()}
    particles, _ = unroll(theta, particles, steps, generator)
    train, _ = evaluation_batches(task)
    return torch.func.vmap(lambda p: task.loss(p, train))(particles["params"]).tolist()


SEEDS = 6
LONGER = 1.4
PLAIN = "as it is"
Run = Callable[[Task, float], list[float]]  # a task and a multiple of its steps -> the final loss of every seed


def compare(suite: Mapping[str, Callable[[], Task]], variants: Mapping[str, Run], out: Path) -> None:
    """Print a row per variant, against the one called ``as it is``.

    Per task the mean over the seeds of log(final train loss of the variant / of the rule as it is), and over all tasks
    the horizon speed-up: how many times longer the rule as it is would have to run for the variant's loss, by the slope
    of its own loss up to 1.4 times the steps.

    Args:
        suite: of tasks.
        variants: by name; a name stands for one way to run, in this call and in later ones.
        out: folder where finished runs are kept; they are not repeated.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["task"], r["variant"], r["multiple"]): r["losses"] for r in lines}

    def logs(task: str, variant: str, multiple: float = 1.0) -> np.ndarray:
        key = (task, variant, multiple)
        if key not in done:
            done[key] = variants[variant](suite[task](), multiple)
            with file.open("a") as lines:
                row = {"task": task, "variant": variant, "multiple": multiple, "losses": done[key]}
                lines.write(json.dumps(row) + "\n")
        return np.log(np.nan_to_num(done[key], nan=1e3, posinf=1e3))

    print("variant | log ratio | horizon speed-up +- standard error |", " | ".join(suite))
    for variant in (v for v in variants if v != PLAIN):
        rows = []
        for task in suite:
            plain = logs(task, PLAIN)
            slope = max(0.05, -(logs(task, PLAIN, LONGER) - plain).mean() / math.log(LONGER))
            change = logs(task, variant) - plain
            rows.append((change.mean(), -change.mean() / slope, change.std(ddof=1) / len(change) ** 0.5 / slope))
        change, faster, error = np.array(rows).T
        weight = 1 / (error**2 + 0.15**2)  # tasks differ by more than their seeds do
        mean = (weight * faster.clip(-2, 2)).sum() / weight.sum()
        print(
            f"{variant} | {change.mean():+.3f} | {math.exp(mean):.2f} +- {weight.sum() ** -0.5:.2f} |",
            " | ".join(f"{x:+.3f}" for x in change),
            flush=True,
        )
