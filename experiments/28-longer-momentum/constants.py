"""A rule with other constants, several seeds of a task in one batch.

    python experiments/28-longer-momentum/constants.py auto_lr.LONGER=0.05 directions.SMALLEST=0.2,auto_lr.AFTER=1
    PYTHONPATH=experiments/23-thin-matrices python experiments/28-longer-momentum/constants.py \
      --suite regressions:SUITE --rule whitened_polar directions.SIZE=2

Each argument is a variant: constants of ``learned_opt.rules``' modules, by module and name, joined by commas. What it
prints: ``batched.compare``.
"""

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from batched import PLAIN, SEEDS, compare, final_losses

from learned_opt.rules import make_rule
from meta_train.bench.suites import suite_named
from tasks.task import Task


def losses(rule: str, constants: str, task: Task, multiple: float) -> list[float]:
    """Final train loss of every seed."""
    with ExitStack() as patches:
        for told in constants.split(",") if constants else ():
            place, value = told.split("=")
            module, name = place.split(".")
            owner = import_module(f"learned_opt.rules.{module}")
            kind = type(getattr(owner, name))  # an unknown name is refused here
            patches.enter_context(mock.patch.object(owner, name, kind(value)))
        return final_losses(task, make_rule(rule), SEEDS, round(multiple * task.steps))


def main() -> None:
    """Run what is missing and print a row per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--suite", default="VALID", help="or package.module:DICT")
    parser.add_argument("--rule", default="auto_lr")
    parser.add_argument("--out", type=Path, default=Path("runs/constants"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {PLAIN: partial(losses, args.rule, "")} | {v: partial(losses, args.rule, v) for v in args.variants}
    compare(suite_named(args.suite), runs, args.out / args.rule)


if __name__ == "__main__":
    main()
