"""Whether NFNOpt's state in bfloat16 costs quality: final train losses, paired with those of its usual state.

    OMP_NUM_THREADS=1 PYTHONPATH=. python experiments/52-aligned-products/run.py [TASK ...] [--seeds 0 1]

Tasks of VALID; same initial weights and batches. Prints the log of the ratio of the losses, and its mean.
"""

import argparse
import math

import torch

from learned_opt import NFNOpt, infer_symmetry
from meta_train.bench.curves import run
from tasks.suites import VALID

torch.set_num_threads(1)


def nfnopt(task, state_dtype):
    """``(model, steps) -> (NFNOpt, None)``."""

    def make(model, steps):
        x = task.batch(torch.Generator().manual_seed(0))[0][:2]
        symmetry = infer_symmetry(model, x, verify=False)
        options = {"total_steps": steps, "state_dtype": state_dtype}
        return NFNOpt(model.named_parameters(), symmetry=symmetry, **options), None

    return make


def main():
    """Run the tasks and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(VALID))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    logs = []
    for name in args.tasks:
        task = VALID[name]()
        pairs = [
            [run(task, nfnopt(task, dtype), seed, task.steps).final_train for dtype in (None, torch.bfloat16)]
            for seed in args.seeds
        ]
        own = [math.log(b / a) for a, b in pairs]
        logs += own
        print(f"{name:24s} {' '.join(f'{x:+.4f}' for x in own)}", flush=True)
    print(f"mean {sum(logs) / len(logs):+.4f} of {len(logs)} runs")


if __name__ == "__main__":
    main()
