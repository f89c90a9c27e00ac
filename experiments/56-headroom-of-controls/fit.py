"""What each control is worth over all families, from the runs of run.py: coefficients of a quadratic fit, +- jackknife.

python experiments/56-headroom-of-controls/fit.py experiments/56-headroom-of-controls/train.jsonl.gz
"""

import sys
from collections import Counter
from pathlib import Path

import torch

from meta_train import jsonl

CONTROLS = ["input", "hidden", "output", "rest", "fresh", "decay", "momentum", "tilt", "bias", "cautious"]
SCALES = torch.tensor([0.6, 0.6, 0.6, 0.6, 1.2, 0.8, 0.4, 0.6, 0.8, 0.6], dtype=torch.float64)
PRODUCTS = [(0, 1), (0, 2), (1, 2), (4, 6), (1, 5), (1, 7), (6, 7)]
RIDGE, LARGEST = 2.0, 0.3


def terms(row):
    """Linear terms, squares and some products of a task's controls, in units of their scales."""
    c = torch.tensor(row["controls"]).double() / SCALES
    c = c * torch.tensor([n in row["roles"] or n not in CONTROLS[:4] for n in CONTROLS])
    return torch.cat([c, c**2, *(c[:, [i]] * c[:, [j]] for i, j in PRODUCTS)], 1)


def fit(rows, kind):
    """Ridge regression in which every family counts the same."""
    count = Counter(r["name"] for r in rows)
    w = torch.cat([torch.full((len(r[kind]),), 1 / count[r["name"]]).double() for r in rows])
    x, y = torch.cat([terms(r) for r in rows]), torch.cat([torch.tensor(r[kind]).double() for r in rows])
    w, y = w / w.mean(), y.clamp(-LARGEST, LARGEST)
    return torch.linalg.solve(x.T @ (w[:, None] * x) + RIDGE * torch.eye(x.shape[1]).double(), x.T @ (w * y))


def main(path):
    """Print the linear terms for train and held-out loss."""
    rows = jsonl.read(path)
    families = sorted({r["name"] for r in rows})
    for kind in ("train", "held_out"):
        whole = fit(rows, kind)
        without = torch.stack([fit([r for r in rows if r["name"] != f], kind) for f in families])
        n = len(families)
        error = ((without - without.mean(0)).square().sum(0) * (n - 1) / n).sqrt()
        print(kind, ", ".join(f"{c} {a:+.3f} +- {e:.3f}" for c, a, e in zip(CONTROLS, whole, error, strict=False)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
