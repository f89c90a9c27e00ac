"""Networks with LayerNorm, and without it on the same photographs: what they want of the whitened polar rule.

    PYTHONPATH=experiments/34-soap-and-normalised-networks python experiments/28-longer-momentum/constants.py \
      --suite normalised:SUITE --rule whitened_polar whitened_polar.VECTOR=1 whitened_polar.BUILTIN_DECAY=0

What it prints: ``batched.compare``.
"""

from functools import partial

from tasks import mlp, residual, transformer
from tasks.data import Noisy, digits, photos, text
from tasks.task import Problem


def blocks(grid: tuple[int, int], activation: str, width: int, hidden: int, depth: int) -> Problem:
    """A residual MLP on noisy photographs."""
    return residual.mlp_classifier(
        f"residual-{depth}",
        Noisy(photos(8, grid), 0.2),
        width=width,
        hidden=hidden,
        depth=depth,
        activation=activation,
        batch_size=64,
        steps=400,
    )


def plain() -> Problem:
    """No normalisation."""
    return mlp.classifier("plain", Noisy(photos(8, (3, 4)), 0.2), [64, 48], "relu", batch_size=64, steps=400)


def characters() -> Problem:
    """A small transformer on text."""
    return transformer.language_model(
        "characters", text(32), width=40, heads=2, depth=2, hidden=120, batch_size=12, steps=500
    )


def patches() -> Problem:
    """A small vision transformer on noisy digits."""
    return transformer.vit(
        "patches", Noisy(digits(), 0.5), 2, width=32, heads=2, depth=2, hidden=96, batch_size=32, steps=500
    )


SUITE = {
    "residual-6": partial(blocks, (3, 4), "relu", 40, 40, 6),
    "residual-10": partial(blocks, (1, 6), "gelu", 32, 64, 10),
    "characters": characters,
    "patches": patches,
    "plain": plain,
}
