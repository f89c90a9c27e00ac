"""An optimizer that knows the symmetry of the network that it trains: ``optimizer = NFNOpt(model.parameters())``.

Its default rule, "auto_lr", is hand-made, and nothing in it is learned. The rule "learned" is a neural functional
network that controls the same steps; it begins exactly at the hand-made rule and ships without learned weights.
Trained from weights that are permuted, rescaled or sign-flipped so that the function is the same, a network follows
exactly (docs/theorem.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

from learned_opt.checkpoint import CheckpointError, load_weights, save_weights
from learned_opt.optimizer import NFNOpt
from learned_opt.rules import RULES, UpdateRule, make_rule
from learned_opt.symmetry import Symmetry, SymmetryError, independent

if TYPE_CHECKING:
    from learned_opt.symmetry.infer import InferenceError, infer_symmetry

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
    "load_weights",
    "make_rule",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    """Load what needs ``torch.export`` when it is first asked for."""
    if name in ("InferenceError", "infer_symmetry"):
        return getattr(importlib.import_module("learned_opt.symmetry.infer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
