"""Final train losses of NFNOpt on a task, as this checkout has it: one line a seed.

    OMP_NUM_THREADS=1 PYTHONPATH=. python experiments/53-size-of-polar-factors/run.py mlp-handwriting --seeds 0 1 2 3

To compare commits, run it in a worktree of each. Tasks of VALID and of the suite that was looked at.
"""

import argparse

import torch

from learned_opt import NFNOpt
from meta_train.bench.curves import run
from meta_train.symmetries import symmetry_of
from tasks import suites

torch.set_num_threads(1)


def main():
    """Run the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    args = parser.parse_args()
    task = (suites.VALID | suites.SEEN)[args.task]()

    def make(model, steps):
        return NFNOpt(model.named_parameters(), symmetry=symmetry_of(task), total_steps=steps), None

    for seed in args.seeds:
        print(f"{args.task} seed {seed}: {run(task, make, seed, task.steps).final_train:.5g}", flush=True)


if __name__ == "__main__":
    main()
