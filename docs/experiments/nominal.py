"""How the nominal step was chosen: powers of the fan-in, rates, frame or not, and the decay without a horizon.

    python docs/experiments/nominal.py VARIANT [VARIANT ...] [--tasks a,b] [--seed 0]

prints, per variant and VALID task, the speed-up over LR-tuned constant-rate Adam (cap 6) and their IQM. Adam's runs
are those of an evaluation in ``--runs`` (default ``runs/valid``; make it with
``python -m meta_train evaluate --optimizers adam --out runs/valid``).
"""

import argparse
from functools import partial
from pathlib import Path

from scipy.stats import trim_mean

import learned_opt.rules.nominal as nominal
from learned_opt import NFNOpt
from meta_train import evaluate
from meta_train.symmetries import symmetry_of
from tasks.suites import VALID

# (multiple of the rate of 0.01, fan-in of RMS 0.2, power of the fan-in, frame, steps before decay or None: cosine)
VARIANTS = {
    "first-row": (1.0, 512, 0.0, False, None),  # "Numbers to beat"
    "frame": (1.0, 512, 0.0, True, None),
    "half-rate": (0.5, 512, 0.0, True, None),
    "double-rate": (2.0, 512, 0.0, True, None),
    "fourfold-rate": (4.0, 512, 0.0, True, None),
    "quarter-256": (1.0, 256, 0.25, True, None),
    "quarter-512": (1.0, 512, 0.25, True, None),
    "quarter-512-frameless": (1.0, 512, 0.25, False, None),
    "half-128": (1.0, 128, 0.5, True, None),
    "half-256": (1.0, 256, 0.5, True, None),
    "anytime-30": (1.0, 512, 0.25, True, 30),
    "anytime-100": (1.0, 512, 0.25, True, 100),
    "anytime-300": (1.0, 512, 0.25, True, 300),
    "anytime-100-double": (2.0, 512, 0.25, True, 100),
}


def main() -> None:
    """Run the variants named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--tasks", default=",".join(VALID))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/valid"))
    args = parser.parse_args()
    found = evaluate.outcomes(*_store(args.runs))
    adam = {o.task: o for o in found if o.optimizer == "adam" and o.seed == args.seed}
    store = evaluate.Store(args.runs / "runs.jsonl")
    for name in args.variants:
        rate, fan_in, power, frame, anytime = VARIANTS[name]

        def polar_step(x, fan_in=fan_in, power=power):
            rows, cols = x.shape[-2:]
            return 0.2 * (fan_in / cols) ** power * max(rows, cols) ** 0.5 * nominal.newton_schulz(x)

        nominal.polar_step = polar_step
        nominal.ANYTIME = anytime or nominal.ANYTIME

        def make(model, *, steps, problem, rate=rate, frame=frame, anytime=anytime):
            horizon = None if anytime else steps
            rule = nominal.Nominal(frame=frame)
            params, symmetry = model.named_parameters(), symmetry_of(problem)
            return NFNOpt(params, symmetry=symmetry, lr=rate, total_steps=horizon, rule=rule), None

        speed_ups = {}
        for task in args.tasks.split(","):
            problem = VALID[task]()
            curve = evaluate.run(problem, partial(make, problem=problem), args.seed, problem.steps)
            plan = store.plan
            key = evaluate.job(plan, task, "adam", adam[task].lr, args.seed, evaluate.CAP * problem.steps).key
            speed_ups[task], _ = evaluate.speed_up(store.runs[key], curve)
        mean = trim_mean(list(speed_ups.values()), 0.25)
        print(f"{name:22s} IQM {mean:.2f} ", " ".join(f"{t} {v:.2f}" for t, v in speed_ups.items()), flush=True)


def _store(folder: Path):
    store = evaluate.Store(folder / "runs.jsonl")
    if store.plan is None:
        raise SystemExit(f"{folder} has no evaluation: python -m meta_train evaluate --optimizers adam --out {folder}")
    return store.plan, store.runs


if __name__ == "__main__":
    main()
