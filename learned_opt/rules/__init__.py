"""The table of update rules. One line is one rule; every rule inherits the whole test contract."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from learned_opt.checkpoint import CheckpointError, load_weights, save_weights
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.learned import Learned
from learned_opt.rules.whitened_polar import WhitenedPolar

SHIPPED = Path(__file__).parent.parent / "checkpoints"

RULES: dict[str, Callable[[], UpdateRule]] = {
    "auto_lr": WhitenedPolar,  # NFNOpt's default: whitened polar steps at a rate that it measures
    "learned": Learned,  # auto_lr under the controls of a neural functional network
    "whitened_polar": partial(WhitenedPolar, measure_lr=False),
}

__all__ = [
    "RULES",
    "CheckpointError",
    "State",
    "UpdateRule",
    "Weights",
    "load_weights",
    "make_rule",
    "save_weights",
]


def make_rule(rule: str | Path | UpdateRule) -> UpdateRule:
    """A rule with its learned weights: by name, from a file, or as it is.

    Args:
        rule: a name in :data:`RULES`, the path of a ``.safetensors`` file (see :func:`save_weights`), or a rule.

    Raises:
        ValueError: neither a known name nor a ``.safetensors`` path.
        CheckpointError: the file is missing, damaged, or holds the weights of another rule.
    """
    if isinstance(rule, UpdateRule):
        return rule
    name = str(rule)
    if name in RULES:
        shipped = SHIPPED / f"{name}.safetensors"
        return _with_theta(shipped) if shipped.is_file() else RULES[name]()
    if name.endswith(".safetensors"):
        return _with_theta(Path(rule))
    raise ValueError(f"unknown rule {name!r}: use one of {', '.join(RULES)}, or the path of a .safetensors file.")


def _with_theta(path: Path) -> UpdateRule:
    name, theta, _ = load_weights(path)
    if name not in RULES:
        raise CheckpointError(path, f"it holds theta of rule {name!r}; known rules: {', '.join(RULES)}.")
    rule = RULES[name]()
    expected = {n: tuple(p.shape) for n, p in rule.named_parameters()}
    found = {n: tuple(t.shape) for n, t in theta.items()}
    if expected != found:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise CheckpointError(path, f"its tensors {', '.join(wrong)} do not fit rule {name!r} of this version.")
    rule.load_state_dict(theta)
    return rule
