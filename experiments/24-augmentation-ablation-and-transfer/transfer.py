"""How NFNOpt carries over to wider, deeper and longer runs than those that it was made on.

    python experiments/24-augmentation-ablation-and-transfer/transfer.py \
      [--rule paced] [--out runs/transfer] [--seeds 1] [--workers 2]

Residual MLPs with LayerNorm on photographs, as in TRAIN, where they have widths up to 48 and up to 3 blocks and runs of
at most 700 steps. Per cell the horizon speed-up over the study's nominal term (`polar`): 1/r for the multiple r of the
steps at which the rule, told that horizon, has the nominal term's final train loss, interpolated between the multiples
that are run. Writes a table and a picture after every cell; what is there is not run again, so that it may be stopped.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from learned_opt import NFNOpt
from meta_train import jsonl
from meta_train.bench.curves import horizon_speed_up, iqm, iqm_interval, run
from meta_train.bench.jobs import pool
from meta_train.symmetries import symmetry_of
from tasks.data import Noisy, photos
from tasks.residual import mlp_classifier

WIDTHS, DEPTHS, STEPS = (48, 160, 480), (3, 9), (600, 3000)
SHORTER, LONGER = (0.8, 0.67, 0.5), (1.25, 1.6)  # multiples of the steps, in the order of the search
NOMINAL = "polar"
Job = tuple[str, int, int, int, int]  # rule, width, blocks, steps, seed


def make_task(width: int, depth: int, steps: int):
    """One cell."""
    return mlp_classifier(
        f"w{width}-d{depth}-t{steps}",
        Noisy(photos(8, (2, 5)), 0.2),
        width=width,
        hidden=width,
        depth=depth,
        activation="relu",
        batch_size=64,
        steps=steps,
    )


def cells() -> list[tuple[int, int, int]]:
    """Every pair of axes but the largest networks for the longest runs, which a processor cannot do."""
    return [(w, d, t) for w in WIDTHS for d in DEPTHS for t in STEPS if (t == STEPS[0] or w < WIDTHS[-1])]


def final_loss(rule: str, cell: tuple[int, int, int], seed: int, multiple: float) -> float:
    """Final train loss of one run, infinite if it diverged."""
    task = make_task(*cell)

    def make(model, *, steps):
        return NFNOpt(model.named_parameters(), symmetry=symmetry_of(task), total_steps=steps, rule=rule), None

    curve = run(task, make, seed, round(multiple * cell[-1]))
    return math.inf if curve.diverged else curve.final_train


def speed_up(job: Job) -> tuple[Job, float]:
    """The job and its result over the nominal term: shorter runs while they reach its loss, else longer ones."""
    torch.set_num_threads(1)
    rule, *cell, seed = job
    target = final_loss(NOMINAL, tuple(cell), seed, 1.0)
    losses = {1.0: final_loss(rule, tuple(cell), seed, 1.0)}
    reached = losses[1.0] <= target
    for multiple in SHORTER if reached else LONGER:
        losses[multiple] = final_loss(rule, tuple(cell), seed, multiple)
        if (losses[multiple] <= target) != reached:
            break
    return job, horizon_speed_up(losses, target)


def main() -> None:
    """Measure what is missing, write ``transfer.md`` and ``transfer.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="paced")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "speed_ups.jsonl"
    lines = jsonl.read(store)
    done = {tuple(r["job"]): r["speed_up"] for r in lines}
    jobs = [(args.rule, *cell, s) for s in range(args.seeds) for cell in cells()]
    missing = sorted((j for j in jobs if j not in done), key=lambda j: j[1] * j[2] * j[3])
    write(args.out, by_cell(args.rule, done))
    with pool(args.workers) as execute, store.open("a") as file:
        for job, found in execute(speed_up, missing):
            done[job] = found
            file.write(json.dumps({"job": job, "speed_up": found}) + "\n")
            file.flush()
            print(*job, f"{found:.3f}", flush=True)
            write(args.out, by_cell(args.rule, done))


def by_cell(rule: str, done: dict[tuple, float]) -> dict[tuple, list[float]]:
    """The speed-ups of every seed that there is."""
    return {cell: [done[j] for j in sorted(done) if j[:-1] == (rule, *cell)] for cell in cells()}


def write(out: Path, found: dict[tuple[int, int, int], list[float]]) -> None:
    """The table and the picture: one map of width and depth per horizon."""
    lines = [
        "| width | blocks | steps | horizon speed-up over the nominal term (seeds) | mean |",
        "|---|---|---|---|---|",
    ]
    for (w, d, t), v in found.items():
        mean = f"{np.mean(v):.2f}" if v else "-"
        lines.append(f"| {w} | {d} | {t} | {', '.join(f'{x:.2f}' for x in v) or 'not run'} | {mean} |")
    seeds = max(map(len, found.values()))
    whole = [v for v in found.values() if v and len(v) == seeds]
    if whole:
        interval = iqm_interval(whole)
        text = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        lines += ["", f"Interquartile mean over cells with all seeds: {iqm(np.concatenate(whole)):.2f}{text}."]
    (out / "transfer.md").write_text("\n".join(lines) + "\n")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(STEPS), 3), layout="constrained")
    for axes, steps in zip(figure.subplots(1, len(STEPS)), STEPS, strict=True):
        table = np.array([[np.mean(found.get((w, d, steps)) or np.nan) for w in WIDTHS] for d in DEPTHS])
        axes.imshow(table, cmap="RdYlGn", vmin=0.6, vmax=1.67, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            axes.text(j, i, "-" if np.isnan(value) else f"{value:.2f}", ha="center", va="center")
        axes.set_xticks(range(len(WIDTHS)), [str(w) for w in WIDTHS])
        axes.set_yticks(range(len(DEPTHS)), [str(d) for d in DEPTHS])
        axes.set_title(f"{steps} steps")
        axes.set_xlabel("width")
        axes.set_ylabel("blocks")
    figure.suptitle("Horizon speed-up over the nominal term")
    figure.savefig(out / "transfer.png", dpi=130)


if __name__ == "__main__":
    main()
