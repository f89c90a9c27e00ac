"""A learned optimizer on equivariant neural functional networks: ``optimizer = NFNOpt(model.parameters())``."""

from learned_opt.inference import InferenceError, infer_symmetry
from learned_opt.optimizer import NFNOpt
from learned_opt.rules import RULES, CheckpointError, UpdateRule, load_theta, make_rule, save_theta
from learned_opt.symmetry import Symmetry, SymmetryError, independent

__all__ = [
    "RULES",
    "CheckpointError",
    "InferenceError",
    "NFNOpt",
    "Symmetry",
    "SymmetryError",
    "UpdateRule",
    "independent",
    "infer_symmetry",
    "load_theta",
    "make_rule",
    "save_theta",
]
