"""Files of learned weights on VALID: paired runs against the hand-made rule, at several lengths.

    OMP_NUM_THREADS=1 python experiments/57-search-by-whole-runs/valid.py THETA ... --out valid.jsonl

A line for every task and length: changes of the logs of the final train and held-out loss, mean of the runs, for each
file. What is there is not run again. At the end a table of means over tasks with 95 % intervals (Student's t).
"""

import argparse
import json
import time
from pathlib import Path

import torch
from scipy import stats

from learned_opt.checkpoint import load_weights
from learned_opt.rules import RULES
from meta_train.paired import paired_ends
from meta_train.search import FLOOR
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.suites import SUITES


def changes(task, thetas, steps, runs, generator):
    """``[2, thetas, runs]``: train and held-out."""
    rule = RULES["learned"]().requires_grad_(False)
    every = [dict(rule.named_parameters()), *thetas]
    theta = {n: torch.stack([t[n] for t in every]).repeat_interleave(runs, 0) for n in every[0]}
    unroll = Unroll(task, rule, symmetry_of(task), (steps, steps), transform="log", floor=FLOOR)
    ends = torch.stack(paired_ends(unroll, theta, len(every), steps, generator))
    return ends[:, 1:] - ends[:, :1]


def main():
    """Make the runs that are missing, and say what they show."""
    parser = argparse.ArgumentParser()
    parser.add_argument("thetas", nargs="+")
    parser.add_argument("--suite", default="VALID")
    parser.add_argument("--lengths", type=float, nargs="*", default=[0.5, 1.0, 3.0])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [load_weights(p)[1] for p in args.thetas]
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(r["task"], r["length"]) for r in rows}
    todo = [(n, x) for x in args.lengths for n in SUITES[args.suite]][args.part :: args.parts]
    for name, length in todo:
        if (name, length) in done:
            continue
        start, task = time.process_time(), SUITES[args.suite][name]()
        steps = max(10, int(length * task.steps))
        generator = generator_of(57, name, (int(10 * length), args.seed))
        train, held = changes(task, found, steps, args.runs, generator)
        row = {"task": name, "length": length, "steps": steps, "train": train.tolist(), "held_out": held.tolist()}
        row["seconds"] = round(time.process_time() - start, 1)
        rows.append(row)
        with args.out.open("a") as f:
            f.write(json.dumps(row) + "\n")
        means = zip(train.mean(1).tolist(), held.mean(1).tolist(), strict=True)
        told = " ".join(f"{x:+.3f}/{y:+.3f}" for x, y in means)
        print(f"{name:28} {length} {told}  {row['seconds']} s", flush=True)
    for length in args.lengths:
        for i, path in enumerate(args.thetas):
            for kind in ("train", "held_out"):
                x = [sum(r[kind][i]) / len(r[kind][i]) for r in rows if r["length"] == length]
                if len(x) > 1:
                    low, high = stats.t.interval(0.95, len(x) - 1, sum(x) / len(x), stats.sem(x))
                    mean = sum(x) / len(x)
                    print(f"{path} x{length} {kind:9} {mean:+.3f} [{low:+.3f}, {high:+.3f}], worst {max(x):+.3f}")


if __name__ == "__main__":
    main()
