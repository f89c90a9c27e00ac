"""Fine-tuning on small residual MLPs that classify photographs (README.md beside this file).

    python -m meta_train train experiments/46-limits-of-meta-training/residual_recipe.py --out runs/residual \
      estimator:es --estimator.particles 32 --estimator.sigma 0.05
    PYTHONPATH=experiments/46-limits-of-meta-training python -m meta_train evaluate \
      --suite residual_recipe:validation --seeds 8 --out runs/compared \
      --optimizers nfnopt whitened_polar=nfn:whitened_polar mine=nfn:runs/residual/theta.safetensors adamw-cosine
"""

from torch import Generator

from meta_train.recipes import Recipe, finetune
from tasks.data import Noisy, photos
from tasks.residual import mlp_classifier
from tasks.task import Task, choice


def make(width: int, depth: int, grid: tuple[int, int] = (1, 5)) -> Task:
    """``depth`` residual blocks of this width; the classes are the regions of two photographs, each cut by ``grid``."""
    return mlp_classifier(
        f"res-{width}",
        Noisy(photos(8, grid), 0.2),
        width=width,
        hidden=width,
        depth=depth,
        activation="relu",
        batch_size=64,
        steps=500,
    )


def _sample(generator: Generator) -> Task:
    return make(choice(generator, (12, 16, 32)), choice(generator, (1, 2, 3)))


families = {"residual": _sample}
validation = {"res-24": lambda: make(24, 2, (2, 5))}  # another width, twenty classes instead of ten


def recipe() -> Recipe:
    """As the library fine-tunes to any family."""
    return finetune("residual")
