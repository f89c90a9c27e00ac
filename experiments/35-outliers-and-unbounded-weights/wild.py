"""One wild gradient in the middle of a run, and how large the weights become.

    python experiments/35-outliers-and-unbounded-weights/wild.py

A ReLU MLP with one output learns a square from 400 batches; the loss of batch 150 is multiplied by a factor. Per
optimizer and factor the final loss and the largest weight, medians of the seeds.
"""

from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn

from learned_opt import NFNOpt
from learned_opt.rules import whitened_polar
from tasks.mlp import mlp

STEPS, AT, SEEDS = 400, 150, 5
NAMES = ("NFNOpt", "NFNOpt, no limit", "Adam")


def target(x: Tensor) -> Tensor:
    """[N, 8] -> [N, 1]."""
    return x.square().sum(1, keepdim=True)


def run(name: str, factor: float, seed: int) -> tuple[float, float]:
    """Final loss and largest weight."""
    torch.manual_seed(seed)
    model = mlp([8, 32, 32, 1], "relu")
    adam = name == "Adam"
    optimizer = torch.optim.Adam(model.parameters(), 3e-3) if adam else NFNOpt(model.parameters(), total_steps=STEPS)
    for step in range(STEPS):
        x = torch.randn(64, 8)
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), target(x)) * (factor if step == AT else 1)).backward()
        optimizer.step()
    with torch.no_grad():
        x = torch.randn(4096, 8)
        largest = max(float(p.abs().max()) for p in model.parameters())
        return float(nn.functional.mse_loss(model(x), target(x))), largest


def main() -> None:
    """A row per optimizer."""
    torch.set_num_threads(1)
    factors = (1.0, 1e2, 1e4, 1e10)
    print("| final loss (largest weight) |", " | ".join(f"x {f:g}" for f in factors), "|")
    for name in NAMES:
        limit = 1e30 if name == "NFNOpt, no limit" else whitened_polar.CLIP_FACTOR
        with mock.patch.object(whitened_polar, "CLIP_FACTOR", limit):
            cells = [zip(*(run(name, f, seed) for seed in range(SEEDS)), strict=True) for f in factors]
        print(f"| {name} |", " | ".join("{:.3g} ({:.3g})".format(*map(median, c)) for c in cells), "|", flush=True)


if __name__ == "__main__":
    main()
