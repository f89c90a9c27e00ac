"""Numbers of the learned rule for all families of TRAIN at once, with what they depend on. Resumable.

    OMP_NUM_THREADS=1 python experiments/57-search-by-whole-runs/train.py --minutes 40 --workers 2 --out runs/train

ResNets are left out: they take half of the time.
"""

import argparse
from pathlib import Path

from meta_train.adapt import adapt
from meta_train.search import Search
from tasks.suites import TRAIN

families = {n: f for n, f in TRAIN.items() if n != "resnet"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    search = Search(tasks=28, copies=14, spread=0.2, slopes=True, horizon=(150, 1000), seed=args.seed)
    adapt(Path(__file__), args.out, args.minutes, search, args.workers)
