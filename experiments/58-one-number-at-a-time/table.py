"""The table of the log: changes by arm, where gradients hardly correlate and elsewhere.

    python experiments/58-one-number-at-a-time/table.py [FILE]
"""

import gzip
import json
import statistics
import sys
from pathlib import Path

FILE = Path(__file__).with_name("changes.jsonl.gz")
ARMS = ("hand-made", *(f"gain {x:+}" for x in (-0.7, -0.35, 0.35, 0.7, 0.9)))
ARMS += ("done -0.4", "done +0.4", "momentum -0.4", "momentum +0.4", "decay -0.5", "decay -0.25", "decay +0.25")
LOW = 0.2  # correlation of gradients


def main():
    """Print it."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    mean = statistics.fmean
    is_low = [mean(r["measured"]["correlation"]) < LOW for r in rows]
    for wanted in (True, False):
        some = [r for r, low in zip(rows, is_low, strict=True) if low == wanted]
        print(f"correlation {'below' if wanted else 'from'} {LOW}: {len(some)} tasks")
        for i, arm in enumerate(ARMS[1:], 1):
            train, held = ([mean(r[k][i]) for r in some] for k in ("train", "held_out"))
            error = statistics.stdev(train) / len(train) ** 0.5
            print(f"  {arm:14} {mean(train):+.3f} +- {error:.3f}, median {statistics.median(train):+.3f}, ", end="")
            print(f"held-out {mean(held):+.3f}, below zero {sum(x < 0 for x in train)}")


if __name__ == "__main__":
    main()
