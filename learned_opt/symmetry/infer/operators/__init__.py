"""What every operator does to labels and scales: one function per ATen operator, found by its name."""

from learned_opt.symmetry.infer.operators import contraction, elementwise, normalisation, recurrent, shape
from learned_opt.symmetry.infer.operators.registry import RULES, register_rule

__all__ = ["RULES", "contraction", "elementwise", "normalisation", "recurrent", "register_rule", "shape"]
