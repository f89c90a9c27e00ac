"""What a rescaled start costs: ``python experiments/08-equivariance-ablation/run.py``.

Final train loss on ``mlp-digits-relu`` from the usual initial weights and from the same network with its hidden units
rescaled by factors log-uniform in [1e-2, 1e2] (the function is the same); three seeds. Adam and Muon at the rates that
are best for the usual start (experiments/results/valid/report.md).
"""

from functools import partial

from learned_opt import NFNOpt, Symmetry
from meta_train.augmentation import UnitsMoved
from meta_train.bench.curves import run
from meta_train.bench.optimizers import OPTIMIZERS
from meta_train.symmetries import symmetry_of
from tasks.suites import VALID


def main() -> None:
    """Print one row per optimizer."""
    task = VALID["mlp-digits-relu"]()

    def nfn(rule: str, symmetry: Symmetry):
        def make(model, *, steps):
            return NFNOpt(model.named_parameters(), symmetry=symmetry, total_steps=steps, rule=rule), None

        return make

    optimizers = {name: nfn(name, symmetry_of(task)) for name in ("auto_lr", "whitened_polar", "learned")}
    optimizers["whitened_polar without the frame"] = nfn("whitened_polar", symmetry_of(task).without_scales)
    optimizers |= {name: partial(OPTIMIZERS[name].factory, lr=0.01) for name in ("adam", "muon-cosine")}
    for name, make in optimizers.items():
        usual, rescaled = (
            [run(problem, make, seed, task.steps).final_train for seed in range(3)]
            for problem in (task, UnitsMoved(task, 1e2))
        )
        print(f"{name:20s} usual {sum(usual) / 3:.4f}   rescaled {sum(rescaled) / 3:.4f}", flush=True)


if __name__ == "__main__":
    main()
