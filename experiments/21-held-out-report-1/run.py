"""Run every task of SEEN once with Adam and print a Markdown table: size, time, first and last losses.

    python experiments/21-held-out-report-1/run.py [RATE] [NAME ...]

Tasks of HELD_OUT can be named, too.

One thread; the seconds are processor time of the training steps (forward, backward, Adam, drawing of batches).
"""

import sys

import torch

from meta_train.bench.curves import run
from meta_train.bench.optimizers import adam
from tasks import suites


def main(lr: float, names: list[str]) -> None:
    """Print the table, a row as soon as it is measured."""
    torch.set_num_threads(1)
    print("| task | parameters | steps x batch | seconds | train: first | last | held out: first | last |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names or suites.SEEN:
        task = (suites.SEEN | suites.HELD_OUT)[name]()
        size = sum(p.numel() for p in task.model.parameters())
        curve = run(task, lambda model, steps: adam(model, lr, steps), 0, task.steps)
        losses = (curve.train[0], curve.final_train, curve.held_out[0], curve.final_held_out)
        cells = [name, f"{size:,}", f"{task.steps} x {task.batch_size}", f"{curve.cpu_seconds:.0f}"]
        print("|", " | ".join(cells + [f"{x:.3g}" for x in losses]), "|", flush=True)


if __name__ == "__main__":
    main(float((sys.argv[1:] or ["1e-3"])[0]), sys.argv[2:])
