"""What one number of the rule at a time is worth on single tasks, beside what the rule measured there.

    OMP_NUM_THREADS=1 python experiments/58-one-number-at-a-time/run.py --out changes.jsonl [--families NAME ...]

Families of TRAIN without ResNets, and those of log 57 (their names begin with "57-"). A line a task: changes of the
logs of the final train and held-out loss against the hand-made rule for every arm and run; and the numbers that the
rule held after three eighths of the run. What is there is not run again.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path

import torch

from learned_opt.rules import RULES
from meta_train.search import FLOOR, with_numbers
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.suites import TRAIN

ROLES = ("matrix", "thin matrix", "embedding", "vector")
GAINS = (-0.7, -0.35, 0.35, 0.7, 0.9)  # logarithms
OTHERS = {"gain: done": (-0.4, 0.4), "momentum": (-0.4, 0.4), "decay": (-0.5, -0.25, 0.25)}
RUNS = 2
LENGTHS = (150, 1000)


def families():
    """By name: functions of a generator that draw a task."""
    found = {n: f for n, f in TRAIN.items() if n != "resnet"}
    for path in sorted((Path(__file__).parents[1] / "57-search-by-whole-runs" / "families").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= {f"57-{n}": f for n, f in module.families.items()}
    return found


def arms(names):
    """Points ``[arms, numbers]``: none, all gains together, and the others one at a time."""
    points = [{}, *({f"gain: {role}": math.atanh(g) for role in ROLES} for g in GAINS)]
    points += [{name: x} for name, values in OTHERS.items() for x in values]
    return torch.tensor([[p.get(n, 0.0) for n in names] for p in points])


def measured(particles):
    """Numbers of the network of the runs of the hand-made rule."""
    return {k: x[:RUNS].tolist() for k, x in particles["state"]["network"].items() if x.ndim == 1}


@torch.no_grad()
def changes(task, steps, generator, arms):
    """A line of the file, of arms as :func:`arms` gives them: the first is the hand-made rule."""
    rule = RULES["learned"]().requires_grad_(False)
    points = arms(list(rule.constants))
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


def main(known, arms, seed):
    """Run the tasks of families that are missing."""
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
            generator = generator_of(seed, family.replace("57-", "x-"), (number,))
            task, (low, high) = known[family](generator), LENGTHS
            steps = int(low * (high / low) ** float(torch.rand((), generator=generator)))
            row = {"family": family, "number": number, "task": task.name, "steps": steps}
            row |= changes(task, steps, generator, arms)
            with args.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
            told = [f"{sum(x) / RUNS:+.2f}" for x in row["train"]]
            print(f"{task.name:40} {steps:4} {' '.join(told)}", flush=True)


if __name__ == "__main__":
    main(families(), arms, 91)
