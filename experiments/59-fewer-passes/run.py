"""Milliseconds of a step at which nothing is due on the slow clock: of NFNOpt on a network of ``bench step``.

    OMP_NUM_THREADS=1 PYTHONPATH=CHECKOUT python experiments/59-fewer-passes/run.py {mlp-small,mlp,gpt}

Processor time of one thread, median of 63 steps after the hundredth. To compare two commits, run it from both in turns.
"""

import statistics
import sys
import time

import torch

from learned_opt import NFNOpt
from meta_train.bench.step import CASES


def main():
    """Print it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, loss = CASES[sys.argv[1]].make()
    optimizer, generator, seconds = NFNOpt(model.parameters(), total_steps=1000), torch.Generator().manual_seed(0), []
    for t in range(1, 180):
        optimizer.zero_grad()
        loss(model(x), generator).backward()
        start = time.process_time()
        optimizer.step()
        if t > 101 and t % 5:
            seconds.append(time.process_time() - start)
    print(f"{sys.argv[1]}: {1e3 * statistics.median(seconds):.1f} ms, {len(seconds)} steps")


if __name__ == "__main__":
    main()
