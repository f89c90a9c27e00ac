"""What a few changes of the rule are worth on families of exact data and of TRAIN, beside what the rule measured.

    OMP_NUM_THREADS=1 python experiments/61-exact-data/run.py --out changes.jsonl [--families NAME ...]

As log 58's script, which it uses, with other families and arms.
"""

import math
import runpy
from pathlib import Path

import torch

from tasks.suites import TRAIN

ROLES = ("matrix", "thin matrix", "embedding", "vector")
HERE = Path(__file__).resolve().parent


def gains(x):
    """Steps of every role times ``exp(x)``."""
    return {f"gain: {role}": math.atanh(x) for role in ROLES}


ARMS = {
    "hand-made": {},
    "steps x0.5": gains(-0.7),
    "steps x0.7": gains(-0.35),
    "steps x1.4": gains(0.35),
    "steps x2": gains(0.7),
    "decay x0.4": {"decay": -0.5},
    "steps x1.4, decay x0.5": gains(0.35) | {"decay": -0.36},
    "momentum longer": {"momentum": -0.4},
    "momentum shorter": {"momentum": 0.4},
    "later decay": {"gain: done": 0.4},
}


def arms(names):
    """Points ``[arms, numbers]``."""
    return torch.tensor([[p.get(n, 0.0) for n in names] for p in ARMS.values()])


def families():
    """By name: functions of a generator that draw a task."""
    exact = runpy.run_path(str(HERE / "families.py"))["FAMILIES"]
    return {f"exact-{n}": f for n, f in exact.items()} | {n: f for n, f in TRAIN.items() if n != "resnet"}


if __name__ == "__main__":
    runpy.run_path(str(HERE.parent / "58-one-number-at-a-time" / "run.py"))["main"](families(), arms, 92)
