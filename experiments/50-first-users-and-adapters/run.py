"""How often the reports' 95 % intervals hold the truth: normal values of 19 tasks, whose true means are known.

    python experiments/50-first-users-and-adapters/run.py [--seeds 3] [--tasks 19] [--repeats 200]

Task means are drawn once, from N(0, 1); a repeat adds noise of N(0, 1) per seed. The truth is the interquartile mean
over very many seeds. Prints the share of repeats whose interval (``iqm_interval``) holds it.
"""

import argparse

import numpy as np

from meta_train.bench.curves import iqm, iqm_interval


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    means = rng.normal(size=(args.tasks, 1))
    truth = iqm((means + rng.normal(size=(args.tasks, 100_000))).flatten())
    held = []
    for _ in range(args.repeats):
        low, high = iqm_interval((means + rng.normal(size=(args.tasks, args.seeds))).tolist())
        held.append(low <= truth <= high)
    share = np.mean(held)
    print(
        f"{share:.3f} +- {(share * (1 - share) / args.repeats) ** 0.5:.3f} of {args.repeats} intervals hold the truth"
    )


if __name__ == "__main__":
    main()
