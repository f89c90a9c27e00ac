"""How NFNOpt carries over to wider, deeper and longer runs than those that it was made on.

    python docs/experiments/transfer.py [--rule paced] [--out docs/transfer] [--seeds 2] [--workers 2]

Residual MLPs with LayerNorm on photographs, as in TRAIN, where they have widths up to 48 and up to 3 blocks and runs of
at most 700 steps. Per cell the horizon speed-up over the study's nominal term (`polar`): 1/r for the multiple r of the
steps at which the rule, told that horizon, has the nominal term's final train loss, interpolated between the multiples
that are run. Writes a table and a picture.
"""

import argparse
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from learned_opt import NFNOpt
from meta_train.curves import horizon_speed_up, run
from meta_train.symmetries import symmetry_of
from tasks.data import Noisy, photos
from tasks.residual import mlp_classifier

WIDTHS, DEPTHS, STEPS = (48, 160, 480), (3, 9), (600, 3000)
MULTIPLES = (0.5, 0.67, 0.8, 1.0, 1.25)  # of the steps
NOMINAL = "polar"


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


def final_loss(job: tuple[str, int, int, int, int, float]) -> float:
    """Final train loss of one run."""
    rule, width, depth, steps, seed, multiple = job
    torch.set_num_threads(1)
    task = make_task(width, depth, steps)

    def make(model, *, steps):
        return NFNOpt(model.named_parameters(), symmetry=symmetry_of(task), total_steps=steps, rule=rule), None

    return run(task, make, seed, round(multiple * steps)).final_train


def main() -> None:
    """Run what is missing, write ``transfer.md`` and ``transfer.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="paced")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "runs.jsonl"
    lines = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    done = {tuple(r["job"]): r["loss"] for r in lines}
    jobs = [
        (rule, *cell, seed, multiple)
        for cell in cells()
        for seed in range(args.seeds)
        for rule, multiples in ((args.rule, MULTIPLES), (NOMINAL, (1.0,)))
        for multiple in multiples
    ]
    missing = sorted((j for j in jobs if j not in done), key=lambda j: j[1] * j[2] * j[3])
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool, store.open("a") as file:
        for job, loss in zip(missing, pool.map(final_loss, missing), strict=True):
            done[job] = loss
            file.write(json.dumps({"job": job, "loss": loss}) + "\n")
            file.flush()
            print(*job, f"{loss:.4g}", flush=True)
    losses = {job: loss if math.isfinite(loss) else math.inf for job, loss in done.items()}
    found = {
        cell: [
            horizon_speed_up({m: losses[args.rule, *cell, s, m] for m in MULTIPLES}, losses[NOMINAL, *cell, s, 1.0])
            for s in range(args.seeds)
        ]
        for cell in cells()
    }
    write(args.out, found)


def write(out: Path, found: dict[tuple[int, int, int], list[float]]) -> None:
    """The table and the picture: one map of width and depth per horizon."""
    lines = ["| width | blocks | steps | horizon speed-up over the nominal term (seeds) |", "|---|---|---|---|"]
    lines += [f"| {w} | {d} | {t} | {', '.join(f'{x:.2f}' for x in v)} |" for (w, d, t), v in found.items()]
    (out / "transfer.md").write_text("\n".join(lines) + "\n")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(STEPS), 3), layout="constrained")
    for axes, steps in zip(figure.subplots(1, len(STEPS)), STEPS, strict=True):
        table = np.array([[np.mean(found.get((w, d, steps), [np.nan])) for w in WIDTHS] for d in DEPTHS])
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
