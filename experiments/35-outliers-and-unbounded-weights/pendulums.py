"""Three pendulums to swing up, whose gradients have outliers: not the one of HELD_OUT.

    PYTHONPATH=experiments/35-outliers-and-unbounded-weights python experiments/28-longer-momentum/constants.py \
      --suite pendulums:SUITE whitened_polar.CLIP_FACTOR=1e30 whitened_polar.CLIP_FACTOR=2

What it prints: ``batched.compare``; the losses themselves are in its ``runs.jsonl``.
"""

from functools import partial

from tasks import policy

SUITE = {
    "short": partial(policy.pendulum, "short", width=24, depth=2, length=30, batch_size=32, steps=500),
    "long": partial(policy.pendulum, "long", width=32, depth=3, length=60, batch_size=48, steps=600, strength=4.0),
    "weak": partial(policy.pendulum, "weak", width=64, depth=1, length=50, batch_size=64, steps=600, strength=2.5),
}
