"""Search for unsound claims: infer the symmetry of random graphs and check it in float64.

python experiments/13-symmetry-inference-fuzzing/run.py --graphs 1000 --seed 5

Prints every graph whose inferred symmetry changes the function (relative error above 1e-9), with the steps that rebuild
it by `tests/symmetry/infer/graphs.py`, and at the end how many graphs had free labels and which operators were unknown.
"""

import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import tyro
from rich.progress import track
from torch import Tensor

from learned_opt import infer_symmetry
from learned_opt.symmetry.infer.network import Network, export
from learned_opt.symmetry.infer.verify import Check

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.symmetry.infer.graphs import FUNCTIONS, JOINS, LAYERS, RandomNet  # noqa: E402

OPERATIONS = [*FUNCTIONS, *JOINS, *LAYERS, "output"]
Steps = list[tuple[str, int, int]]


def drawn(rng: random.Random) -> Steps:
    """One to seven operations and the earlier values that they read."""
    return [(rng.choice(OPERATIONS), rng.randint(0, 1), rng.randint(0, 3)) for _ in range(rng.randint(1, 7))]


def joined(outputs: Tensor | list[Tensor]) -> Tensor:
    """All outputs as one tensor."""
    return torch.cat([y.flatten() for y in outputs]) if isinstance(outputs, list) else outputs


def error(steps: Steps, seed: int) -> tuple[float, bool, tuple[str, ...]]:
    """Largest relative change under sampled group elements (NaN: outputs are not finite), whether a label is free,
    notes."""
    torch.manual_seed(seed)
    model, x = RandomNet(steps), torch.randn(3, 4)
    symmetry = infer_symmetry(model, x, verify=False)
    free = any(not label.fixed for label in symmetry.labels.values())
    check = Check(Network(model, export(model, (x,), {})), seed=seed)
    if not check.possible:
        return float("nan"), free, symmetry.notes
    worst = check.sampled(symmetry, 4)
    if "dropout" not in [name for name, _, _ in steps]:  # draws anew in every call of the model itself
        worst = max(worst, symmetry.check(model, x, output=joined))
    return worst, free, symmetry.notes


def main(graphs: int = 1000, seed: int = 0) -> None:
    """Infer and check.

    Args:
        graphs: how many.
        seed: of all of them.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rng = random.Random(seed)
    unsound = undecided = free = 0
    unknown: Counter[str] = Counter()
    for number in track(range(graphs), "graphs"):
        steps = drawn(rng)
        try:
            worst, has_free, notes = error(steps, seed * 1_000_000 + number)
        except Exception as problem:
            unsound += 1
            print(f"{number}: {steps}: {type(problem).__name__}: {problem}", flush=True)
            continue
        free += has_free
        unknown.update(note.split()[0] for note in notes)
        undecided += worst != worst
        if worst > 1e-9:
            unsound += 1
            print(f"{number}: {steps}: {worst:.1e}", flush=True)
    print(f"{graphs} graphs, {free} with free labels, {unsound} unsound or failed, {undecided} not finite")
    print("unknown operators: " + (", ".join(f"{name} {n}" for name, n in unknown.most_common()) or "none"))


if __name__ == "__main__":
    tyro.cli(main)
