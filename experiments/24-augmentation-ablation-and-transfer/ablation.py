"""Does equivariance replace augmentation, and what does the network add? Three rules, with and without reparametrised
tasks, three meta-seeds each.

    python experiments/24-augmentation-ablation-and-transfer/ablation.py \
      [--out runs/ablation] [--seeds 3] [--outer-steps 20]

Trains every cell with the recipe ``shipped`` cut to ``--outer-steps`` (runs of 150 to 400 steps, 8 particles), then
runs its theta on VALID from the usual initial weights and from weights moved by the networks' symmetries (units
rescaled by 0.1 to 10): the same functions. Prints the mean over tasks of log(final train loss / that of the hand-made
rule from usual weights), and its spread over meta-seeds. An interrupted run goes on where it stopped.

For the learned rule with the frame, moved units are the same tasks: it is not trained on them twice.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from batched import final_losses

from learned_opt.checkpoint import load_weights
from learned_opt.rules import make_rule
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.learned import LAST, Learned
from learned_opt.symmetry import Symmetry
from meta_train import jsonl
from meta_train.augmentation import augmented
from meta_train.estimators import ES
from meta_train.loop import train
from meta_train.recipes import shipped
from tasks.suites import VALID


class WithoutScales(UpdateRule):
    """A rule that knows the permutations of a network alone."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def init(self, params: Weights, symmetry: Symmetry) -> State:
        return self.rule.init(params, symmetry.without_scales)

    def forward(
        self, params: Weights, grads: Weights, state: State, symmetry: Symmetry, **options
    ) -> tuple[Weights, State]:
        return self.rule(params, grads, state, symmetry.without_scales, **options)


RULES = {
    "learned-parameter": lambda: WithoutScales(Learned(pool=False)),
    "learned-permutation": lambda: WithoutScales(Learned()),
    "learned": Learned,
}
CELLS = (  # rule, augmentation
    ("learned-parameter", "none"),
    ("learned-parameter", "units"),
    ("learned-permutation", "none"),
    ("learned-permutation", "units"),
    ("learned", "none"),
)
STARTS = ("usual", "moved")
SCALE = 10.0
RUNS = 3  # per task and start


def recipe(rule: str, augmentation: str, seed: int, outer_steps: int):
    """The shipped recipe, shorter."""
    return replace(
        shipped(),
        rule=rule,
        augmentation=augmentation,
        augmentation_scale=SCALE,
        seed=seed,
        outer_steps=outer_steps,
        estimator=ES(particles=8, sigma=0.05),
        horizon=(150, 400),
        lr=0.02,
        trained=LAST if rule == "learned" else tuple(f"rule.{n}.{kind}" for n in LAST for kind in ("weight", "bias")),
    )


def measured(file: Path, names: Sequence[str], key: str, rule) -> dict[tuple[str, str], list[float]]:
    """Final train losses by (start, task), read from the file or run and appended to it."""
    lines = jsonl.read(file)
    done = {(r["start"], r["task"]): r["losses"] for r in lines if r["key"] == key}
    for start in STARTS:
        for name in names:
            if (start, name) in done:
                continue
            task = augmented(VALID[name](), "units" if start == "moved" else "none", SCALE, torch.Generator())
            done[start, name] = final_losses(task, rule, RUNS)
            with file.open("a") as out:
                out.write(json.dumps({"key": key, "start": start, "task": name, "losses": done[start, name]}) + "\n")
    return done


def main() -> None:
    """Train and measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outer-steps", type=int, default=20)
    parser.add_argument("--tasks", default=",".join(VALID))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file, names = args.out / "runs.jsonl", args.tasks.split(",")

    def mean_log(found: dict[tuple[str, str], list[float]], start: str) -> float:
        per_task = [np.log(np.nan_to_num(found[start, n], nan=1e3, posinf=1e3).clip(max=1e3)).mean() for n in names]
        return float(np.mean(per_task))

    hand_made = make_rule("auto_lr")
    zero = mean_log(measured(file, names, "hand-made", hand_made), "usual")
    plain = measured(file, names, "hand-made, no frame", WithoutScales(hand_made))
    rows = {("nothing learned, no frame", "-"): [[mean_log(plain, s) - zero] for s in STARTS]}
    for rule, augmentation in CELLS:
        found = []
        for seed in range(args.seeds):
            folder = args.out / f"{rule}-{augmentation}-{seed}"
            path = train(recipe(rule, augmentation, seed, args.outer_steps), folder, rules=RULES)
            learned = RULES[rule]()
            learned.load_state_dict(load_weights(path)[1])
            found.append(measured(file, names, folder.name, learned.requires_grad_(False)))
            rows[rule, augmentation] = [[mean_log(f, s) - zero for f in found] for s in STARTS]
            show(rows)


def show(rows: dict[tuple[str, str], list[list[float]]]) -> None:
    """A Markdown table: mean over meta-seeds +- standard deviation."""
    print("| rule | augmentation | usual start | moved units |\n|---|---|---|---|")
    for (rule, augmentation), starts in rows.items():
        cells = [f"{np.mean(v):+.3f} +- {np.std(v, ddof=1) if len(v) > 1 else 0:.3f}" for v in starts]
        print(f"| {rule} | {augmentation} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
