"""Held-out losses of NFNOpt on the streaming tasks, beside those of tuned AdamW + cosine (stored).

    OMP_NUM_THREADS=1 PYTHONPATH=. python experiments/51-two-clocks/streaming.py [TASK or TASK@STEPS ...] [--seeds 0 1]

Prints per task and seed NFNOpt's held-out loss after the last step and its ratio to AdamW's at the best of the four
rates (best by the mean over seeds; ratio of the means over the same seeds). Same initial weights and batches for both.
--adamw runs AdamW too and stores it, --store stores NFNOpt's losses (in --file); --lr FACTOR
and --rule NAME are passed to NFNOpt.
"""

import argparse
import copy
import json
import math
import os
import time

import torch

torch.set_num_threads(1)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ADAMW_SEEDS = (0, 1)
HELD_SEED = 987654321
FILE = "experiments/51-two-clocks/streaming.json"


def tasks():
    """The streaming tasks by name."""
    from tasks import suites

    return {**suites.STREAMING, **suites.STREAMING_LATER}


def cells():
    """Tasks, and the seed case at other horizons."""
    names = []
    for name in tasks():
        names.append(name)
        if name == "stream-mlp-teacher":
            names += [f"{name}@{steps}" for steps in (100, 400, 1000)]
    return names


def build(cell):
    """The task of a cell."""
    name, _, steps = cell.partition("@")
    task = tasks()[name]()
    if steps:
        task = copy.copy(task)
        task.steps = int(steps)
    return task


def examples(task):
    """How many held-out examples: enough for a standard error of about 0.3 % at most."""
    x = task.held_out()[0]
    return 131072 if x[0].ndim == 1 and x.is_floating_point() else 32768 if x[0].ndim == 3 else 8192


def evaluate(task, params):
    """Mean held-out loss, and its standard error over it."""
    g = torch.Generator().manual_seed(HELD_SEED)
    n = examples(task)
    chunk = 1024 if n > 8192 else 256
    with torch.no_grad():
        losses = torch.tensor([float(task.loss(params, task._sample(g, chunk))) for _ in range(n // chunk)]).double()
    return float(losses.mean()), float(losses.std() / len(losses) ** 0.5 / losses.mean())


def train(task, make, seed):
    """Held-out loss, its relative standard error and CPU seconds of one run."""
    g = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(task.model).train()
    with torch.no_grad():
        for name, w in task.init(g).items():
            model.get_parameter(name).copy_(w)
    optimizer, scheduler = make(model, task)
    params = dict(model.named_parameters())
    start = time.process_time()
    for _ in range(task.steps):
        batch = task.batch(g)
        optimizer.zero_grad()
        loss = task.loss(params, batch)
        if not loss.isfinite():
            return math.inf, 0.0, time.process_time() - start
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    spent = time.process_time() - start
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return *evaluate(task, params), spent


def adamw(lr):
    """AdamW + cosine at a rate."""

    def make(model, task):
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)

    return make


def nfnopt(options):
    """NFNOpt with options."""

    def make(model, task):
        from learned_opt import NFNOpt, infer_symmetry

        x = task.batch(torch.Generator().manual_seed(0))[0][:2]
        symmetry = infer_symmetry(model, x, verify=False)
        return NFNOpt(model.named_parameters(), symmetry=symmetry, total_steps=task.steps, **options), None

    return make


def load(file):
    """What is stored, by cell."""
    return json.load(open(file)) if os.path.exists(file) else {}


def save(file, cell, entry):
    """Add to what is stored of a cell."""
    stored = load(file)
    stored.setdefault(cell, {}).update(entry)
    with open(file + ".tmp", "w") as out:
        json.dump(stored, out, indent=1)
    os.replace(file + ".tmp", file)


def best(entry):
    """(rate, {seed: loss}) of the best rate by the mean over its seeds."""
    rate = min(entry["adamw"], key=lambda r: sum(entry["adamw"][r].values()) / len(entry["adamw"][r]))
    return rate, entry["adamw"][rate]


def main():
    """Run the cells and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--adamw", action="store_true")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--rule")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--file", default=FILE)
    args = parser.parse_args()
    options = {k: v for k, v in (("rule", args.rule), ("lr", args.lr)) if v is not None}
    logs = []
    for cell in args.cells or cells():
        task = build(cell)
        if args.adamw:
            table, error = {}, 0.0
            for lr in RATES:
                runs = {str(seed): train(task, adamw(lr), seed) for seed in args.seeds}
                table[str(lr)] = {seed: r[0] for seed, r in runs.items()}
                error = max(error, *(r[1] for r in runs.values()))
            save(
                args.file, cell, {"steps": task.steps, "examples": examples(task), "adamw": table, "relative_se": error}
            )
        runs = {str(seed): train(task, nfnopt(options), seed) for seed in args.seeds}
        mine = {seed: r[0] for seed, r in runs.items()}
        if args.store:
            save(args.file, cell, {"nfnopt": mine})
        entry = load(args.file).get(cell, {})
        text = f"{cell:28s} NFNOpt {' '.join(f'{x:.4f}' for x in mine.values())}"
        if "adamw" in entry:
            rate, theirs = best(entry)
            theirs = {s: x for s, x in theirs.items() if s in mine} or theirs
            ratio = (sum(mine.values()) / len(mine)) / (sum(theirs.values()) / len(theirs))
            logs.append(math.log(ratio))
            text += f" | AdamW@{rate} {' '.join(f'{x:.4f}' for x in theirs.values())} | ratio {ratio:.4f}"
            text += f" (se of a loss {entry['relative_se']:.2%})"
        print(text + f" | {sum(r[2] for r in runs.values()):.1f} s", flush=True)
    if logs:
        print(f"geometric mean of the ratios {math.exp(sum(logs) / len(logs)):.4f}, worst {math.exp(max(logs)):.4f}")


if __name__ == "__main__":
    main()
