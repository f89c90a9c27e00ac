"""Numbers of the learned rule for TRAIN and the families of exact data at once, as log 57's search. Resumable.

    OMP_NUM_THREADS=1 python experiments/61-exact-data/train.py --minutes 80 --workers 1 --out runs/exact
"""

import argparse
import runpy
from pathlib import Path

from meta_train.adapt import adapt
from meta_train.search import Search
from tasks.suites import TRAIN

exact = runpy.run_path(str(Path(__file__).with_name("families.py")))["FAMILIES"]
families = {n: f for n, f in TRAIN.items() if n != "resnet"} | {f"exact-{n}": f for n, f in exact.items()}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    search = Search(tasks=28, copies=12, spread=0.25, slopes=True, horizon=(150, 1000), seed=args.seed)
    adapt(Path(__file__), args.out, args.minutes, search, args.workers)
