"""What a few changes of the rule are worth on families of exact data and of TRAIN, beside what the rule measured.

    OMP_NUM_THREADS=1 python experiments/61-exact-data/run.py --out changes.jsonl [--families NAME ...]

A line a task: changes of the logs of the final train and held-out loss against the hand-made rule for every arm and
run; and the numbers that the rule held after three eighths of the run. What is there is not run again.
"""

import argparse
import json
import math
import runpy
from pathlib import Path

import torch

from learned_opt.rules import RULES
from meta_train.search import FLOOR, with_numbers
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.suites import TRAIN

ROLES = ("matrix", "thin matrix", "embedding", "vector")
RUNS = 2
LENGTHS = (150, 1000)


def gains(x):
    """Steps of every role times ``exp(x)``."""
    return {f"gain: {role}": math.atanh(x) for role in ROLES}


ARMS = {
    "hand-made": {},
    "steps x0.5": gains(-0.7),
    "steps x0.7": gains(-0.35),
    "steps x1.4": gains(0.35),
    "steps x2": gains(0.7),
    "decay x0.4": {"decay": -0.5},
    "steps x1.4, decay x0.5": gains(0.35) | {"decay": -0.36},
    "momentum longer": {"momentum": -0.4},
    "momentum shorter": {"momentum": 0.4},
    "later decay": {"gain: done": 0.4},
}


def families():
    """By name: functions of a generator that draw a task."""
    exact = runpy.run_path(str(Path(__file__).with_name("families.py")))["FAMILIES"]
    return {f"exact-{n}": f for n, f in exact.items()} | {n: f for n, f in TRAIN.items() if n != "resnet"}


def measured(particles):
    """Numbers of the network of the runs of the hand-made rule."""
    return {k: x[:RUNS].tolist() for k, x in particles["state"]["network"].items() if x.ndim == 1}


@torch.no_grad()
def changes(task, steps, generator):
    """A line of the file."""
    rule = RULES["learned"]().requires_grad_(False)
    points = torch.tensor([[p.get(n, 0.0) for n in rule.constants] for p in ARMS.values()])
    theta = with_numbers(rule, rule.constants, points.repeat_interleave(RUNS, 0))
    unroll = Unroll(task, rule, symmetry_of(task), (steps, steps), transform="log", floor=FLOOR)
    count = RUNS * len(points)
    options = {"copies": len(points), "batched": True, "resets": False}
    start = unroll.init(count, generator, copies=len(points), common=True)
    known = max(60, 3 * steps // 8 + 2)
    middle, first = unroll(theta, start, known, generator, **options)
    end, second = unroll(theta, middle, steps - known, generator, **options)
    train = torch.cat([first.loss, second.loss])[-max(1, steps // 10) :].mean(0).view(-1, RUNS)
    held_out = tuple(b.expand(count, *b.shape) for b in task.held_out())
    held = unroll.losses(end["params"], held_out).view(-1, RUNS)
    final = {"loss": train[0].tolist(), "measured": measured(middle)}
    return {"train": (train - train[:1]).tolist(), "held_out": (held - held[:1]).tolist(), **final}


def main():
    """Run the tasks that are missing."""
    known = families()
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="*", default=list(known))
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(r["family"], r["number"]) for r in rows}
    for number in range(args.tasks):
        for family in args.families:
            if (family, number) in done:
                continue
            generator = generator_of(92, family, (number,))
            task, (low, high) = known[family](generator), LENGTHS
            steps = int(low * (high / low) ** float(torch.rand((), generator=generator)))
            row = {"family": family, "number": number, "task": task.name, "steps": steps}
            row |= changes(task, steps, generator)
            with args.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
            told = [f"{sum(x) / RUNS:+.2f}" for x in row["train"][1:]]
            told += [f"{k} {sum(row['measured'][k]) / RUNS:+.2f}" for k in ("correlation", "slope", "log_lr")]
            print(f"{task.name:40} {steps:4} {sum(row['loss']) / RUNS:+.1f} | {' '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
