"""The table of the log: changes by the slope along the last step.

    python experiments/61-exact-data/table.py

Rows of this experiment and of log 58, without those whose loss ended at the floor. A change beyond 1 counts as 1.
"""

import gzip
import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = (HERE / "changes.jsonl.gz", HERE.parent / "58-one-number-at-a-time" / "changes.jsonl.gz")
ARMS = {"x1.4": 3, "x2": 4}  # their place in both files
SLOPES = (-1.0, -0.1, -0.035, -0.015, 1.0)
FLOOR = -11.3


def main():
    """Print it."""
    mean = statistics.fmean
    rows = [json.loads(line) for path in FILES for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    rows = [r for r in rows if mean(r.get("loss", [0.0])) > FLOOR]
    for low, high in zip(SLOPES[:-1], SLOPES[1:], strict=True):
        some = [r for r in rows if low <= mean(r["measured"]["slope"]) < high]
        text = f"slope {low:+.3f} to {high:+.3f}: {len(some)} tasks"
        for arm, k in ARMS.items():
            each = [max(-1.0, min(1.0, mean(r["train"][k]))) for r in some]
            text += f", {arm} {mean(each):+.2f} +- {statistics.stdev(each) / len(each) ** 0.5:.2f}"
        print(text)


if __name__ == "__main__":
    main()
