"""What every operator does to labels and scales: one function per ATen operator, found by its name."""

from learned_opt.symmetry.infer.operators import (
    contraction,
    elementwise,
    gathering,
    normalisation,
    ordering,
    recurrent,
    shape,
    spectral,
)
from learned_opt.symmetry.infer.operators.registry import RULES, register_rule

__all__ = [
    "RULES",
    "contraction",
    "elementwise",
    "gathering",
    "normalisation",
    "ordering",
    "recurrent",
    "register_rule",
    "shape",
    "spectral",
]
