"""Does equivariance replace augmentation, and what does the network add? Three rules, with and without reparametrised
tasks, three meta-seeds each.

    python experiments/24-augmentation-ablation-and-transfer/ablation.py \
      [--out runs/ablation] [--seeds 3] [--outer-steps 20]

Trains every cell with the recipe ``shipped`` cut to ``--outer-steps`` (runs of 150 to 400 steps, 8 particles), then
runs its theta on VALID from the usual initial weights and from weights moved by the networks' symmetries (units
rescaled by 0.1 to 10): the same functions. Prints the mean over tasks of log(final train loss / that of the nominal
term in the frame from usual weights), and its spread over meta-seeds. An interrupted run goes on where it stopped.

For the monomial rule, moved units are the same tasks: it is not trained on them twice.
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

from learned_opt.rules import make_rule
from meta_train import jsonl
from meta_train.augmentation import augmented
from meta_train.estimators import ES
from meta_train.loop import train
from meta_train.recipes import shipped
from tasks.suites import VALID

CELLS = (  # rule, augmentation
    ("nfn-alone", "none"),
    ("nfn-alone", "units"),
    ("nfn-permutation", "none"),
    ("nfn-permutation", "units"),
    ("nfn", "none"),
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

    zero = mean_log(measured(file, names, "nominal", make_rule("nominal")), "usual")
    plain = measured(file, names, "nominal-frameless", make_rule("nominal-frameless"))
    rows = {("nothing learned, no frame", "-"): [[mean_log(plain, s) - zero] for s in STARTS]}
    for rule, augmentation in CELLS:
        found = []
        for seed in range(args.seeds):
            folder = args.out / f"{rule}-{augmentation}-{seed}"
            path = train(recipe(rule, augmentation, seed, args.outer_steps), folder)
            found.append(measured(file, names, folder.name, make_rule(path)))
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
