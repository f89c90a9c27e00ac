"""One task of SEEN with more seeds: how many times longer `whitened_polar` needs than NFNOpt, and which ends lower.

    python experiments/45-fine-tuning-regressions/run.py TASK [--seeds 30] \
      [--rule auto_lr] [--opponent whitened_polar] [--workers 1] [--out DIR]

Only these two are run, not tuned Adam. Finished runs are not repeated; runs.jsonl of an evaluation in the same folder
counts. Prints every seed, then the median and the interquartile mean of horizon speed-ups with 95 % bootstrap
intervals, and the mean logarithm of the ratio of final train losses with its standard error.
"""

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from meta_train.bench.curves import iqm
from meta_train.bench.evaluate import carry_out, make_plan
from meta_train.bench.outcomes import REFERENCE, final_curve, search_horizon


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--rule", default="auto_lr")
    parser.add_argument("--opponent", default="whitened_polar")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more: one says nothing of their spread")
    data = os.environ.get("LEARNED_OPT_DATA")
    pair = args.rule, args.opponent
    named = [f"{label}=nfn:{label}" for label in pair]
    plan = make_plan("SEEN", [args.task], named, args.seeds, 1, ["/".join(pair)], data, None, None)
    plan = replace(plan, optimizers={k: v for k, v in plan.optimizers.items() if k != REFERENCE})
    runs = carry_out(plan, args.out, workers=args.workers, data=data)
    ends = np.log([[final_curve(plan, runs, args.task, k, s).final_train for k in pair] for s in range(args.seeds)])
    found = np.array([search_horizon(plan, runs, args.task, *pair, s) for s in range(args.seeds)])
    for seed, (end, speed_up) in enumerate(zip(ends, found, strict=True)):
        print(f"seed {seed}: {math.exp(end[0]):.4g}, {args.opponent} {math.exp(end[1]):.4g}, horizon {speed_up:.2f}")
    for name, statistic in (("median", np.median), ("interquartile mean", iqm)):
        drawn = bootstrap([found], statistic, method="percentile", rng=np.random.default_rng(0)).confidence_interval
        print(f"{name} of horizon speed-ups {statistic(found):.2f} [{drawn.low:.2f}, {drawn.high:.2f}]")
    ratios = ends[:, 0] - ends[:, 1]
    print(f"log loss over {args.opponent}'s {ratios.mean():+.3f} +- {ratios.std(ddof=1) / len(ratios) ** 0.5:.3f}")


if __name__ == "__main__":
    main()
